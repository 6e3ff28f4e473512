// Where registers lie. PTX has one for every value, tens of thousands in the largest kernels; those whose lives do not meet
// share a row, so that a warp's registers stay in the CPU's cache.
//
// A register lives from its first to its last instruction in the order of the text, stretched over the blocks of code in
// which its value is needed later (liveness, solved backwards over the branches). Lanes follow the same branches each for
// itself, so what holds for one path holds for each lane.
#include <cxxabi.h>
#include <algorithm>
#include <climits>
#include <cstdlib>

#include "simulator/program.h"

namespace madkernels::simulator {
namespace {

struct Stretch {  // of code without a branch into or out of its middle: [begin, end)
  int begin = 0, end = 0;
  std::vector<int> next;
};

std::vector<Stretch> stretches_of(const std::vector<Instruction>& code) {
  std::vector<bool> starts(code.size() + 1);
  starts[0] = starts[code.size()] = true;
  for (size_t i = 0; i < code.size(); i++) {
    if (code[i].flow == Flow::kBranch) starts[static_cast<size_t>(code[i].target)] = true;
    if (code[i].flow == Flow::kBranch || code[i].flow == Flow::kReturn) starts[i + 1] = true;
  }
  std::vector<int> number(code.size() + 1);
  std::vector<Stretch> all;
  for (size_t i = 0; i <= code.size(); i++) {
    if (starts[i] && !all.empty()) all.back().end = static_cast<int>(i);
    if (starts[i] && i < code.size()) all.push_back({static_cast<int>(i), 0, {}});
    number[i] = static_cast<int>(all.size()) - 1;
  }
  for (size_t i = 0; i < all.size(); i++) {
    const Instruction& last = code[static_cast<size_t>(all[i].end - 1)];
    const bool always = last.guard == kNone;
    if (last.flow == Flow::kBranch) all[i].next.push_back(number[static_cast<size_t>(last.target)]);
    const bool goes_on = (last.flow != Flow::kBranch && last.flow != Flow::kReturn) || !always;
    if (goes_on && i + 1 < all.size()) all[i].next.push_back(static_cast<int>(i) + 1);
  }
  return all;
}

template <class F>
void for_sources(const Instruction& in, F&& f) {
  for (const int row : in.from) {
    if (row >= 0) f(row);
  }
  if (in.guard >= 0) f(in.guard);
}
template <class F>
void for_results(const Instruction& in, F&& f) {
  for (const int row : in.to) {
    if (row >= 0) f(row);
  }
}

class Bits {
 public:
  explicit Bits(size_t count) : words_((count + 63) / 64) {}
  bool has(int i) const { return words_[static_cast<size_t>(i) / 64] >> (i % 64) & 1; }
  void set(int i) { words_[static_cast<size_t>(i) / 64] |= uint64_t{1} << (i % 64); }
  // this = (other without `killed`) and what was there -> whether it grew
  bool add(const Bits& other, const Bits& killed) {
    uint64_t grown = 0;
    for (size_t i = 0; i < words_.size(); i++) {
      const uint64_t before = words_[i];
      words_[i] |= other.words_[i] & ~killed.words_[i];
      grown |= words_[i] ^ before;
    }
    return grown != 0;
  }
  template <class F>
  void for_each(F&& f) const {
    for (size_t i = 0; i < words_.size(); i++) {
      for (uint64_t word = words_[i]; word != 0; word &= word - 1) f(static_cast<int>(64 * i) + __builtin_ctzll(word));
    }
  }

 private:
  std::vector<uint64_t> words_;
};

// What is needed at the beginning of each stretch: registers read there or later before they are written for certain.
std::vector<Bits> needed_at(const std::vector<Instruction>& code, const std::vector<Stretch>& stretches, size_t registers) {
  std::vector<Bits> needed(stretches.size(), Bits(registers)), written = needed;
  for (size_t s = 0; s < stretches.size(); s++) {
    for (int i = stretches[s].begin; i < stretches[s].end; i++) {
      const Instruction& in = code[static_cast<size_t>(i)];
      for_sources(in, [&](int r) {
        if (!written[s].has(r)) needed[s].set(r);
      });
      if (in.guard == kNone) for_results(in, [&](int r) { written[s].set(r); });
    }
  }
  for (bool grows = true; grows;) {
    grows = false;
    for (size_t s = stretches.size(); s-- > 0;) {
      for (const int next : stretches[s].next) grows |= needed[s].add(needed[static_cast<size_t>(next)], written[s]);
    }
  }
  return needed;
}

struct Life {
  int first = INT_MAX, last = -1;
  void reach(int at) { first = std::min(first, at), last = std::max(last, at); }
};

std::vector<Life> lives_of(const Kernel& kernel, const std::vector<Stretch>& stretches, const std::vector<Bits>& needed,
                           size_t registers) {
  std::vector<Life> lives(registers);
  for (size_t i = 0; i < kernel.code.size(); i++) {
    const auto reach = [&](int r) { lives[static_cast<size_t>(r)].reach(static_cast<int>(i)); };
    for_sources(kernel.code[i], reach), for_results(kernel.code[i], reach);
  }
  for (size_t s = 0; s < stretches.size(); s++) {
    needed[s].for_each([&](int r) { lives[static_cast<size_t>(r)].reach(stretches[s].begin); });
    for (const int next : stretches[s].next) {
      needed[static_cast<size_t>(next)].for_each([&](int r) { lives[static_cast<size_t>(r)].reach(stretches[s].end - 1); });
    }
  }
  for (const Special& special : kernel.specials) lives[static_cast<size_t>(special.row)].reach(0);
  return lives;
}

// Rows of one width only follow each other: what an instruction writes may lie where it reads, lane by lane.
std::vector<int> places_of(const std::vector<Life>& lives, const std::vector<Width>& widths, int& bytes) {
  std::vector<int> order, places(lives.size(), kNone);
  for (size_t r = 0; r < lives.size(); r++) {
    if (lives[r].last >= 0) order.push_back(static_cast<int>(r));
  }
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return lives[static_cast<size_t>(a)].first < lives[static_cast<size_t>(b)].first; });
  std::vector<std::pair<int, int>> alive[4], none;  // heaps by the width: -last, place
  std::vector<int> free[4];
  for (const int r : order) {
    const auto w = static_cast<size_t>(widths[static_cast<size_t>(r)]);
    const Life& life = lives[static_cast<size_t>(r)];
    while (!alive[w].empty() && -alive[w].front().first < life.first) {
      free[w].push_back(alive[w].front().second);
      std::pop_heap(alive[w].begin(), alive[w].end());
      alive[w].pop_back();
    }
    int& place = places[static_cast<size_t>(r)];
    if (free[w].empty()) {
      place = bytes;
      bytes += std::max(bytes_of_row(static_cast<Width>(w)), 64);
    } else {
      place = free[w].back();
      free[w].pop_back();
    }
    alive[w].emplace_back(-life.last, place);
    std::push_heap(alive[w].begin(), alive[w].end());
  }
  return places;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

}  // namespace

void allocate_registers(Kernel& kernel, const std::vector<Width>& widths) {
  const std::vector<Stretch> stretches = stretches_of(kernel.code);
  const std::vector<Bits> needed = needed_at(kernel.code, stretches, widths.size());
  const std::vector<Life> lives = lives_of(kernel, stretches, needed, widths.size());
  const std::vector<int> places = places_of(lives, widths, kernel.register_bytes);
  const auto move = [&](int& row) {
    if (row >= 0) row = places[static_cast<size_t>(row)];
  };
  for (Instruction& in : kernel.code) {
    for (int& row : in.to) move(row);
    for (int& row : in.from) move(row);
    move(in.guard);
  }
  std::vector<bool> is_special(widths.size());
  for (Special& special : kernel.specials) is_special[static_cast<size_t>(special.row)] = true, move(special.row);
  needed[0].for_each([&](int r) {
    if (is_special[static_cast<size_t>(r)]) return;
    kernel.read_before_written.push_back(places[static_cast<size_t>(r)]);
    kernel.read_before_written.push_back(bytes_of_row(widths[static_cast<size_t>(r)]));
  });
}

// "void madkernels::(anonymous namespace)::scan<float, (int)16>(Params)" -> "scan<float, 16>"
std::string Kernel::short_name() const {
  std::string name = demangled(text.name);
  if (!name.empty() && name.back() == ')') {  // the arguments: what the last parenthesis closes
    int depth = 0;
    for (size_t i = name.size(); i-- > 0;) {
      depth += (name[i] == ')') - (name[i] == '(');
      if (depth == 0) {
        name.resize(i);
        break;
      }
    }
  }
  for (const std::string cast : {"(int)", "(bool)", "(anonymous namespace)::", "madkernels::", "void "}) {
    for (size_t at; (at = name.find(cast)) != std::string::npos;) name.erase(at, cast.size());
  }
  return name;
}

std::string Kernel::place_of(const Instruction& in) const {
  const Statement& s = text.statements[static_cast<size_t>(in.text)];
  const std::string ptx =
      s.name + " of " + module->path().substr(module->path().rfind('/') + 1) + ":" + std::to_string(s.line);
  const std::string own = module->name_of(s.source), outside = module->name_of(s.outside);
  if (own.empty()) return outside.empty() ? ptx : outside + ", " + ptx;
  return own + (outside.empty() ? ", " : " in " + outside + ", ") + ptx;
}

}  // namespace madkernels::simulator
