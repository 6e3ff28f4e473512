// Loads, stores and asynchronous copies (9.7.9), atomics (9.7.13). Every access is looked at: whether it is
// aligned to its size, whether it stays inside, and, where races are looked for, what it meets.
#include <algorithm>
#include <cstring>

#include "simulator/instructions.h"
#include "simulator/machine.h"

namespace madkernels::simulator {
namespace {

uint64_t address_of(const Warp& w, const Instruction& in, int operand, int lane) {
  if (in.from[operand] == kNone) return static_cast<uint64_t>(in.offset);
  const bool wide = in.address_width == Width::k64;
  const uint64_t base = wide ? w.source<uint64_t>(in.from[operand])[lane] : w.source<uint32_t>(in.from[operand])[lane];
  return base + static_cast<uint64_t>(in.offset);
}

void check_alignment(const Warp& w, const Instruction& in, int lane, uint64_t address, int bytes) {
  if (address % static_cast<uint64_t>(bytes) == 0) return;
  report(w, in, lane,
         "a misaligned access: " + std::to_string(bytes) + " bytes at an address that is " +
             std::to_string(address % static_cast<uint64_t>(bytes)) + " more than a multiple of that");
}

unsigned char* in_shared(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, Access access) {
  Block& block = *w.block;
  if (address + static_cast<uint64_t>(bytes) > block.shared.size()) {
    report(w, in, lane,
           "out of bounds: byte " + std::to_string(address) + " of " + std::to_string(block.shared.size()) +
               " bytes of shared memory");
  }
  if (machine().settings.races) block.races.touch(w, in, lane, static_cast<uint32_t>(address), bytes, access);
  return block.shared.data() + address;
}

unsigned char* in_global(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, Access access) {
  GlobalMemory& memory = machine().memory;
  if (!memory.holds(address, address + static_cast<uint64_t>(bytes))) {
    report(w, in, lane, "out of bounds: " + memory.nearest(address));
  }
  if (machine().settings.races) memory.races.touch(w, in, lane, address, bytes, access);
  return reinterpret_cast<unsigned char*>(address);
}

unsigned char* in_parameters(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes) {
  const Launch& launch = *w.block->launch;
  if (address + static_cast<uint64_t>(bytes) > static_cast<uint64_t>(launch.kernel->text.parameter_bytes)) {
    report(w, in, lane, "out of bounds of the kernel's parameters");
  }
  return const_cast<unsigned char*>(launch.parameters) + address;
}

// Where an access goes on the host, after all checks.
unsigned char* place_of(Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, Access access) {
  check_alignment(w, in, lane, address, bytes);
  switch (in.space) {
    case Space::kShared: return in_shared(w, in, lane, static_cast<uint32_t>(address), bytes, access);
    case Space::kParameter: return in_parameters(w, in, lane, address, bytes);
    case Space::kGlobal: return in_global(w, in, lane, address, bytes, access);
    case Space::kGeneric: break;
  }
  return address >= kSharedWindow ? in_shared(w, in, lane, address - kSharedWindow, bytes, access)
                                  : in_global(w, in, lane, address, bytes, access);
}

uint64_t value_at(const unsigned char* place, const Instruction& in) {
  uint64_t value = 0;
  std::memcpy(&value, place, in.bytes);
  const int unused = 64 - 8 * in.bytes;
  return in.is_signed ? static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused) : value;
}

// Elements of T to rows of T, which is what most loads are.
template <class T>
void load_plain(Warp& w, const Instruction& in, uint32_t active) {
  for_lanes(active, [&](int l) {
    const unsigned char* from = place_of(w, in, l, address_of(w, in, 0, l), in.bytes * in.count, Access::kRead);
    for (int i = 0; i < in.count; i++) std::memcpy(w.result<T>(in.to[i]) + l, from + i * in.bytes, sizeof(T));
  });
}

// Parameters at a fixed place are the same in all lanes.
template <class T>
void load_parameter(Warp& w, const Instruction& in, uint32_t active) {
  const unsigned char* from =
      in_parameters(w, in, std::countr_zero(active), static_cast<uint64_t>(in.offset), in.bytes * in.count);
  for (int i = 0; i < in.count; i++) {
    T value;
    std::memcpy(&value, from + i * in.bytes, sizeof(T));
    T* const to = w.result<T>(in.to[i]);
    for (int l = 0; l < 32; l++) to[l] = active >> l & 1 ? value : to[l];
  }
}

template <class T>
void store_plain(Warp& w, const Instruction& in, uint32_t active) {
  for_lanes(active, [&](int l) {
    unsigned char* to = place_of(w, in, l, address_of(w, in, 0, l), in.bytes * in.count, Access::kWrite);
    for (int i = 0; i < in.count; i++) std::memcpy(to + i * in.bytes, w.source<T>(in.from[i + 1]) + l, sizeof(T));
  });
}

bool is_plain(const Instruction& in) { return bytes_of_row(in.value_width) == 32 * in.bytes; }

uint64_t combined(const Instruction& in, uint64_t old, uint64_t a, uint64_t b) {
  const auto as_signed = [&](uint64_t v) {
    return in.bytes == 4 ? int64_t{static_cast<int32_t>(v)} : static_cast<int64_t>(v);
  };
  const bool less = in.is_signed ? as_signed(a) < as_signed(old) : a < old;
  switch (static_cast<Atomic>(in.mode)) {
    case Atomic::kAdd: return old + a;
    case Atomic::kAddFloat:
      return std::bit_cast<uint32_t>(std::bit_cast<float>(static_cast<uint32_t>(old)) +
                                     std::bit_cast<float>(static_cast<uint32_t>(a)));
    case Atomic::kMin: return less ? a : old;
    case Atomic::kMax: return less ? old : a;
    case Atomic::kAnd: return old & a;
    case Atomic::kOr: return old | a;
    case Atomic::kXor: return old ^ a;
    case Atomic::kExchange: return a;
    case Atomic::kCompareAndSwap: return old == a ? b : old;
  }
  return old;
}

void arrive(Warp& w, const Instruction& in, int lane, const Copy& copy) {
  const int bytes = copy.bytes + copy.zeros;
  unsigned char* to = in_shared(w, in, lane, copy.to, bytes, Access::kCopyArrives);
  std::memcpy(to, copy.from, static_cast<size_t>(copy.bytes));
  std::memset(to + copy.bytes, 0, static_cast<size_t>(copy.zeros));
}

}  // namespace

void load(Warp& w, const Instruction& in, uint32_t active) {
  const bool fixed = in.space == Space::kParameter && in.from[0] == kNone;
  if (is_plain(in) && in.bytes == 4)
    return fixed ? load_parameter<uint32_t>(w, in, active) : load_plain<uint32_t>(w, in, active);
  if (is_plain(in) && in.bytes == 8)
    return fixed ? load_parameter<uint64_t>(w, in, active) : load_plain<uint64_t>(w, in, active);
  if (is_plain(in) && in.bytes == 2)
    return fixed ? load_parameter<uint16_t>(w, in, active) : load_plain<uint16_t>(w, in, active);
  for_lanes(active, [&](int l) {
    const unsigned char* from = place_of(w, in, l, address_of(w, in, 0, l), in.bytes * in.count, Access::kRead);
    for (int i = 0; i < in.count; i++) set_value(w, in.to[i], in.value_width, l, value_at(from + i * in.bytes, in));
  });
}

void store(Warp& w, const Instruction& in, uint32_t active) {
  if (is_plain(in) && in.bytes == 4) return store_plain<uint32_t>(w, in, active);
  if (is_plain(in) && in.bytes == 8) return store_plain<uint64_t>(w, in, active);
  if (is_plain(in) && in.bytes == 2) return store_plain<uint16_t>(w, in, active);
  for_lanes(active, [&](int l) {  // the lower bytes of wider registers
    unsigned char* to = place_of(w, in, l, address_of(w, in, 0, l), in.bytes * in.count, Access::kWrite);
    const size_t row = static_cast<size_t>(bytes_of_row(in.value_width)) / 32;
    for (int i = 0; i < in.count; i++) {
      std::memcpy(to + i * in.bytes, w.source<unsigned char>(in.from[i + 1]) + row * static_cast<size_t>(l), in.bytes);
    }
  });
}

void atomic(Warp& w, const Instruction& in, uint32_t active) {
  const auto operand = [&](int i, int l) -> uint64_t {
    if (in.from[i] == kNone) return 0;
    return in.bytes == 4 ? w.source<uint32_t>(in.from[i])[l] : w.source<uint64_t>(in.from[i])[l];
  };
  for_lanes(active, [&](int l) {
    unsigned char* place = place_of(w, in, l, address_of(w, in, 0, l), in.bytes, Access::kAtomic);
    uint64_t old = 0;
    std::memcpy(&old, place, in.bytes);
    const uint64_t next = combined(in, old, operand(1, l), operand(2, l));
    std::memcpy(place, &next, in.bytes);
    if (in.to[0] != kNone) set_value(w, in.to[0], in.value_width, l, old);
  });
}

void copy_later(Warp& w, const Instruction& in, uint32_t active) {
  constexpr unsigned char kUnderWay = 0xff;
  for_lanes(active, [&](int l) {
    const uint32_t to = static_cast<uint32_t>(w.source<uint32_t>(in.from[0])[l] + static_cast<uint64_t>(in.offset));
    const uint64_t from = w.source<uint64_t>(in.from[1])[l];
    const int given = in.from[2] == kNone ? in.bytes : w.source<int>(in.from[2])[l];
    const int bytes = std::clamp(given, 0, static_cast<int>(in.bytes));
    check_alignment(w, in, l, to, in.bytes);
    check_alignment(w, in, l, from, in.bytes);
    std::memset(in_shared(w, in, l, to, in.bytes, Access::kCopyBegins), kUnderWay, in.bytes);
    const unsigned char* source = bytes > 0 ? in_global(w, in, l, from, bytes, Access::kRead) : nullptr;
    w.block->copies[static_cast<size_t>(w.thread(l))].push_back({to, source, bytes, in.bytes - bytes});
  });
}

void commit_copies(Warp& w, const Instruction&, uint32_t active) {
  for_lanes(active, [&](int l) { w.block->copies[static_cast<size_t>(w.thread(l))].push_back({0, nullptr, -1, 0}); });
}

void wait_for_copies(Warp& w, const Instruction& in, uint32_t active) {
  for_lanes(active, [&](int l) {
    std::vector<Copy>& copies = w.block->copies[static_cast<size_t>(w.thread(l))];
    auto groups = std::count_if(copies.begin(), copies.end(), [](const Copy& c) { return c.bytes < 0; });
    size_t done = 0;
    for (; groups > in.offset; done++) {
      if (copies[done].bytes < 0) {
        groups--;
      } else {
        arrive(w, in, l, copies[done]);
      }
    }
    if (in.mode != 0) {  // all, groups or not
      for (; done < copies.size(); done++) {
        if (copies[done].bytes >= 0) arrive(w, in, l, copies[done]);
      }
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<long>(done));
  });
}

// What threads leave under way when they end comes all the same.
void end_copies(Warp& w, uint32_t lanes) {
  for_lanes(lanes, [&](int l) {
    std::vector<Copy>& copies = w.block->copies[static_cast<size_t>(w.thread(l))];
    for (const Copy& copy : copies) {
      if (copy.bytes >= 0) arrive(w, w.block->launch->kernel->code.back(), l, copy);
    }
    copies.clear();
  });
}

}  // namespace madkernels::simulator
