// Instructions that compute a lane's result from that lane's registers. Each line is a name and the function of one lane.
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "simulator/block.h"
#include "simulator/instructions.h"
#include "simulator/warp.h"

namespace madkernels::simulator {
namespace {

using Table = std::map<std::string, Form>;

// Integers wrap around; narrow ones must not overflow the int that C++ makes of them.
template <class T>
using Wrapping = std::common_type_t<std::make_unsigned_t<T>, unsigned>;
template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;

template <class T>
constexpr int kBits = 8 * sizeof(T);

template <class T>
T multiply_high(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<W>(a) * static_cast<W>(b) >> 64);
  } else {
    return static_cast<T>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b) >> kBits<T>);
  }
}

// Division by zero gives what the ISA leaves open, so it is reported.
template <class T, bool kRemainder>
void divide(Warp& w, const Instruction& in, uint32_t active) {
  const Operand<T> a(w, in.from[0]), b(w, in.from[1]);
  T* const to = w.result<T>(in.to[0]);
  for_lanes(active, [&](int l) {
    const T x = a[l], y = b[l];
    if (y == 0) report(w, in, l, "division by zero");
    if (std::is_signed_v<T> && y == static_cast<T>(-1)) {
      to[l] = kRemainder ? 0 : static_cast<T>(-static_cast<Wrapping<T>>(x));
    } else {
      to[l] = static_cast<T>(kRemainder ? x % y : x / y);
    }
  });
}

// 9.7.1
template <class T>
void add_integers(Table& t, const std::string& type) {
  using W = Wrapping<T>;
  constexpr Width width = width_of<T>();
  t["add." + type] = each([](T a, T b) { return static_cast<T>(static_cast<W>(a) + static_cast<W>(b)); });
  t["sub." + type] = each([](T a, T b) { return static_cast<T>(static_cast<W>(a) - static_cast<W>(b)); });
  t["mul.lo." + type] = each([](T a, T b) { return static_cast<T>(static_cast<W>(a) * static_cast<W>(b)); });
  t["mul.hi." + type] = each([](T a, T b) { return multiply_high(a, b); });
  t["mad.lo." + type] =
      each([](T a, T b, T c) { return static_cast<T>(static_cast<W>(a) * static_cast<W>(b) + static_cast<W>(c)); });
  t["min." + type] = each([](T a, T b) { return a < b ? a : b; });
  t["max." + type] = each([](T a, T b) { return a > b ? a : b; });
  t["div." + type] = {&divide<T, false>, {width, width, width}};
  t["rem." + type] = {&divide<T, true>, {width, width, width}};
  // 9.7.8: counts beyond the width count as the width
  t["shr." + type] = each([](T a, uint32_t n) { return static_cast<T>(n < kBits<T> ? a >> n : a < 0 ? -1 : 0); });
  if constexpr (std::is_signed_v<T>) {
    t["neg." + type] = each([](T a) { return static_cast<T>(-static_cast<W>(a)); });
    t["abs." + type] = each([](T a) { return static_cast<T>(a < 0 ? -static_cast<W>(a) : static_cast<W>(a)); });
  }
  if constexpr (sizeof(T) < 8) {
    using D = std::conditional_t<sizeof(T) == 4, Wide<T>, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>;
    t["mul.wide." + type] = each([](T a, T b) { return static_cast<D>(a) * static_cast<D>(b); });
    t["mad.wide." + type] = each([](T a, T b, D c) {
      return static_cast<D>(static_cast<Wrapping<D>>(static_cast<D>(a) * static_cast<D>(b)) + static_cast<Wrapping<D>>(c));
    });
  }
}

// 9.7.6, of integers: lo, ls, hi and hs are the unsigned names
template <class T>
void compare_integers(Table& t, const std::string& type) {
  t["setp.eq." + type] = each([](T a, T b) { return a == b; });
  t["setp.ne." + type] = each([](T a, T b) { return a != b; });
  for (const char* name : {"lt", "lo"}) t[std::string("setp.") + name + "." + type] = each([](T a, T b) { return a < b; });
  for (const char* name : {"le", "ls"}) t[std::string("setp.") + name + "." + type] = each([](T a, T b) { return a <= b; });
  for (const char* name : {"gt", "hi"}) t[std::string("setp.") + name + "." + type] = each([](T a, T b) { return a > b; });
  for (const char* name : {"ge", "hs"}) t[std::string("setp.") + name + "." + type] = each([](T a, T b) { return a >= b; });
}

// Values of which only the bits count: T is unsigned.
template <class T>
void add_bits(Table& t, const std::string& bits, std::initializer_list<std::string> types) {
  // 9.7.8
  t["and.b" + bits] = each([](T a, T b) { return static_cast<T>(a & b); });
  t["or.b" + bits] = each([](T a, T b) { return static_cast<T>(a | b); });
  t["xor.b" + bits] = each([](T a, T b) { return static_cast<T>(a ^ b); });
  t["not.b" + bits] = each([](T a) { return static_cast<T>(~a); });
  t["shl.b" + bits] = each([](T a, uint32_t n) { return static_cast<T>(n < kBits<T> ? a << n : 0); });
  t["shr.b" + bits] = each([](T a, uint32_t n) { return static_cast<T>(n < kBits<T> ? a >> n : 0); });
  // 9.7.6
  t["setp.eq.b" + bits] = each([](T a, T b) { return a == b; });
  t["setp.ne.b" + bits] = each([](T a, T b) { return a != b; });
  for (const std::string& type : types) {
    t["selp." + type] = each([](T a, T b, bool p) { return p ? a : b; });
    t["mov." + type] = each([](T a) { return a; });  // 9.7.9
  }
}

// x below the normal numbers becomes a zero of its sign, as .ftz says of operands and results.
float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }

template <class T>
T smaller(T a, T b) {  // of a number and a NaN the number; -0 is smaller than +0
  return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
}

// `sum` is the double nearest to the exact `sum + error`: the float next below it, or next towards zero.
float rounded_down(double sum, double error) {
  const float nearest = static_cast<float>(sum);
  const bool above = nearest > sum || (nearest == sum && error < 0);
  return above ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}
float rounded_to_zero(double sum, double error) {
  const float nearest = static_cast<float>(sum);
  const bool beyond = std::fabs(nearest) > std::fabs(sum) || (nearest == sum && (sum > 0 ? error < 0 : error > 0));
  return beyond ? std::nextafter(nearest, 0.f) : nearest;
}
// What a + b loses by its rounding.
double error_of_sum(double a, double b) {
  const double sum = a + b, rest = sum - a;
  return (a - (sum - rest)) + (b - rest);
}

// 2^x to 1e-11, rounded once: more exact than any GPU.
float exp2_of(float x) {
  constexpr double kTerms[] = {1.0,
                               0.6931471805599453,
                               0.2402265069591007,
                               0.05550410866482158,
                               0.009618129107628477,
                               0.0013333558146428443,
                               0.0001540353039338161,
                               1.5252733804059841e-05,
                               1.321548679014431e-06,
                               1.0178086009239699e-07};
  const double clamped = x < -200.f ? -200.0 : x > 200.f ? 200.0 : x != x ? 0.0 : x;
  const double rounded = std::floor(clamped + 0.5), r = clamped - rounded;
  double p = kTerms[9];
  for (int i = 8; i >= 0; i--) p = p * r + kTerms[i];
  const double power = std::bit_cast<double>((static_cast<int64_t>(rounded) + 1023) << 52);
  return x != x ? x : static_cast<float>(p * power);
}

// 9.7.3
template <class T>
void add_floats(Table& t, const std::string& type) {
  for (const char* rn : {"", "rn."}) {
    t[std::string("add.") + rn + type] = each([](T a, T b) { return a + b; });
    t[std::string("sub.") + rn + type] = each([](T a, T b) { return a - b; });
    t[std::string("mul.") + rn + type] = each([](T a, T b) { return a * b; });
  }
  t["fma.rn." + type] = each([](T a, T b, T c) { return std::fma(a, b, c); });
  t["div.rn." + type] = each([](T a, T b) { return a / b; });
  t["rcp.rn." + type] = each([](T a) { return 1 / a; });
  t["sqrt.rn." + type] = each([](T a) { return std::sqrt(a); });
  t["neg." + type] = each([](T a) { return -a; });
  t["abs." + type] = each([](T a) { return std::fabs(a); });
  t["copysign." + type] = each([](T a, T b) { return std::copysign(b, a); });  // the sign is the first operand's
  t["min." + type] = each([](T a, T b) { return smaller(a, b); });
  t["max." + type] = each([](T a, T b) { return larger(a, b); });
  // 9.7.6: false where either is NaN, but for ne and those that end in u
  t["setp.eq." + type] = each([](T a, T b) { return a == b; });
  t["setp.ne." + type] = each([](T a, T b) { return a < b || a > b; });
  t["setp.lt." + type] = each([](T a, T b) { return a < b; });
  t["setp.le." + type] = each([](T a, T b) { return a <= b; });
  t["setp.gt." + type] = each([](T a, T b) { return a > b; });
  t["setp.ge." + type] = each([](T a, T b) { return a >= b; });
  t["setp.equ." + type] = each([](T a, T b) { return !(a < b || a > b); });
  t["setp.neu." + type] = each([](T a, T b) { return !(a == b); });
  t["setp.ltu." + type] = each([](T a, T b) { return !(a >= b); });
  t["setp.leu." + type] = each([](T a, T b) { return !(a > b); });
  t["setp.gtu." + type] = each([](T a, T b) { return !(a <= b); });
  t["setp.geu." + type] = each([](T a, T b) { return !(a < b); });
  t["setp.num." + type] = each([](T a, T b) { return a == a && b == b; });
  t["setp.nan." + type] = each([](T a, T b) { return a != a || b != b; });
}

// 9.7.3, of float32 alone: rounding downwards and to zero, and approximations, which are exact to the last bit here
void add_single_floats(Table& t) {
  t["fma.rm.f32"] = each([](float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;  // the product is exact
    if (sum == 0) return std::signbit(product) || std::signbit(c) ? -0.f : 0.f;
    return rounded_down(sum, error_of_sum(product, c));
  });
  t["add.rz.f32"] = each([](float a, float b) { return rounded_to_zero(static_cast<double>(a) + b, error_of_sum(a, b)); });
  t["ex2.approx.f32"] = each([](float a) { return exp2_of(a); });
  t["ex2.approx.ftz.f32"] = each([](float a) { return flushed(exp2_of(flushed(a))); });
  t["rcp.approx.ftz.f32"] = each([](float a) { return flushed(1 / flushed(a)); });
  t["lg2.approx.ftz.f32"] = each([](float a) { return std::log2(flushed(a)); });
  t["rsqrt.approx.ftz.f32"] = each([](float a) { return static_cast<float>(1 / std::sqrt(double{flushed(a)})); });
}

// 9.7.9, cvt of floats to integers: rounded, NaN to zero, clamped to what the type holds
template <class To, class From, class Round>
To to_integer(From x, Round&& round) {
  const double r = round(static_cast<double>(x));
  constexpr double kBelow = std::is_signed_v<To> ? -std::ldexp(1.0, kBits<To> - 1) : 0.0;
  constexpr double kAbove = std::ldexp(1.0, std::is_signed_v<To> ? kBits<To> - 1 : kBits<To>);
  if (r != r) return 0;
  return r <= kBelow ? std::numeric_limits<To>::min() : r >= kAbove ? std::numeric_limits<To>::max() : static_cast<To>(r);
}

template <class I, class F>
void convert_between(Table& t, const std::string& integer, const std::string& real) {
  t["cvt.rn." + real + "." + integer] = each([](I a) { return static_cast<F>(a); });
  t["cvt.rni." + integer + "." + real] =
      each([](F a) { return to_integer<I>(a, [](double x) { return std::nearbyint(x); }); });
  t["cvt.rzi." + integer + "." + real] = each([](F a) { return to_integer<I>(a, [](double x) { return std::trunc(x); }); });
  t["cvt.rmi." + integer + "." + real] = each([](F a) { return to_integer<I>(a, [](double x) { return std::floor(x); }); });
  t["cvt.rpi." + integer + "." + real] = each([](F a) { return to_integer<I>(a, [](double x) { return std::ceil(x); }); });
}

uint16_t to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
uint16_t to_float16(float x) { return x != x ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

void add_conversions(Table& t) {
  convert_between<int32_t, float>(t, "s32", "f32"), convert_between<uint32_t, float>(t, "u32", "f32");
  convert_between<int64_t, float>(t, "s64", "f32"), convert_between<uint64_t, float>(t, "u64", "f32");
  convert_between<int32_t, double>(t, "s32", "f64"), convert_between<uint32_t, double>(t, "u32", "f64");
  convert_between<int64_t, double>(t, "s64", "f64"), convert_between<uint64_t, double>(t, "u64", "f64");
  t["cvt.rni.f32.f32"] = each([](float a) { return std::nearbyint(a); });
  t["cvt.rzi.f32.f32"] = each([](float a) { return std::trunc(a); });
  t["cvt.rmi.f32.f32"] = each([](float a) { return std::floor(a); });
  t["cvt.rpi.f32.f32"] = each([](float a) { return std::ceil(a); });
  t["cvt.sat.f32.f32"] = each([](float a) { return a > 0.f ? (a < 1.f ? a : 1.f) : 0.f; });  // NaN to zero
  t["cvt.f64.f32"] = each([](float a) { return static_cast<double>(a); });
  t["cvt.rn.f32.f64"] = each([](double a) { return static_cast<float>(a); });
  t["cvt.f32.f16"] = each([](uint16_t a) { return static_cast<float>(std::bit_cast<_Float16>(a)); });
  t["cvt.rn.f16.f32"] = each([](float a) { return to_float16(a); });
  t["cvt.f32.bf16"] = each([](uint16_t a) { return std::bit_cast<float>(static_cast<uint32_t>(a) << 16); });
  t["cvt.rn.bf16.f32"] = each([](float a) { return to_bfloat16(a); });
  // The first operand goes to the upper half.
  t["cvt.rn.f16x2.f32"] = each([](float a, float b) { return static_cast<uint32_t>(to_float16(a)) << 16 | to_float16(b); });
  t["cvt.rn.bf16x2.f32"] =
      each([](float a, float b) { return static_cast<uint32_t>(to_bfloat16(a)) << 16 | to_bfloat16(b); });
  // The commonest between integers; convert_integer does all.
  t["cvt.s64.s32"] = each([](int32_t a) { return static_cast<int64_t>(a); });
  t["cvt.u64.u32"] = each([](uint32_t a) { return static_cast<uint64_t>(a); });
  t["cvt.u32.u64"] = each([](uint64_t a) { return static_cast<uint32_t>(a); });
}

// Of predicates
void add_predicates(Table& t) {
  t["mov.pred"] = each([](bool a) { return a; });
  t["not.pred"] = each([](bool a) { return !a; });
  t["and.pred"] = each([](bool a, bool b) { return a && b; });
  t["or.pred"] = each([](bool a, bool b) { return a || b; });
  t["xor.pred"] = each([](bool a, bool b) { return a != b; });
}

// 9.7.1, bfi: the lowest `length` bits of a in the place of those of b from bit `first` on.
template <class B>
B insert_bits(B a, B b, uint32_t first, uint32_t length) {
  first &= 0xff, length &= 0xff;
  for (uint32_t i = 0; i < length && first + i < 8 * sizeof(B); i++) {
    const B bit = B{1} << (first + i);
    b = i < 8 * sizeof(B) && (a >> i & 1) ? b | bit : b & ~bit;
  }
  return b;
}

// 9.7.1 and 9.7.8, what has 32 bits only
void add_bit_tricks(Table& t) {
  t["popc.b32"] = each([](uint32_t a) { return static_cast<uint32_t>(std::popcount(a)); });
  t["clz.b32"] = each([](uint32_t a) { return static_cast<uint32_t>(std::countl_zero(a)); });
  t["brev.b32"] = each([](uint32_t a) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
    return r;
  });
  // Byte i of the result is byte (c >> 4 i) % 8 of b : a, or that byte's sign.
  t["prmt.b32"] = each([](uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
      const uint32_t which = c >> (4 * i), byte = static_cast<uint32_t>(both >> (which % 8 * 8)) & 0xff;
      r |= (which & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return r;
  });
  // Bit by bit the truth table d of a, b, c.
  t["lop3.b32"] = each([](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint32_t r = 0;
    for (int i = 0; i < 8; i++) r |= d >> i & 1 ? (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c) : 0;
    return r;
  });
  // The upper word of b : a, shifted to the left; the lower one, shifted to the right; by c modulo 32 or at most 32.
  t["shf.l.wrap.b32"] = each([](uint32_t a, uint32_t b, uint32_t c) {
    return static_cast<uint32_t>(((static_cast<uint64_t>(b) << 32 | a) << (c & 31)) >> 32);
  });
  t["shf.r.wrap.b32"] = each([](uint32_t a, uint32_t b, uint32_t c) {
    return static_cast<uint32_t>((static_cast<uint64_t>(b) << 32 | a) >> (c & 31));
  });
}

Table make_table() {
  Table t;
  add_bits<uint16_t>(t, "16", {"b16", "u16", "s16"});
  add_bits<uint32_t>(t, "32", {"b32", "u32", "s32", "f32"});
  add_bits<uint64_t>(t, "64", {"b64", "u64", "s64", "f64"});
  add_integers<int16_t>(t, "s16"), add_integers<uint16_t>(t, "u16");
  add_integers<int32_t>(t, "s32"), add_integers<uint32_t>(t, "u32");
  add_integers<int64_t>(t, "s64"), add_integers<uint64_t>(t, "u64");
  compare_integers<int16_t>(t, "s16"), compare_integers<uint16_t>(t, "u16");
  compare_integers<int32_t>(t, "s32"), compare_integers<uint32_t>(t, "u32");
  compare_integers<int64_t>(t, "s64"), compare_integers<uint64_t>(t, "u64");
  add_floats<float>(t, "f32"), add_floats<double>(t, "f64");
  add_single_floats(t);
  add_conversions(t);
  add_predicates(t);
  add_bit_tricks(t);
  t["bfi.b32"] = each([](uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return insert_bits(a, b, c, d); });
  t["bfi.b64"] = each([](uint64_t a, uint64_t b, uint32_t c, uint32_t d) { return insert_bits(a, b, c, d); });
  // 9.7.9, cvta: a global or parameter address is the same in the generic space here
  for (const char* name : {"cvta.to.global.u64", "cvta.global.u64"}) t[name] = each([](uint64_t a) { return a; });
  t["cvta.shared.u64"] = each([](uint64_t a) { return a + kSharedWindow; });
  t["cvta.to.shared.u64"] = each([](uint64_t a) { return a - kSharedWindow; });
  return t;
}

uint64_t value_of(const Warp& w, int row, Width width, int lane) {
  return width == Width::k16   ? w.source<uint16_t>(row)[lane]
         : width == Width::k32 ? w.source<uint32_t>(row)[lane]
                               : w.source<uint64_t>(row)[lane];
}

}  // namespace

const std::map<std::string, Form>& elementwise_instructions() {
  static const Table table = make_table();
  return table;
}

void set_value(Warp& w, int row, Width width, int lane, uint64_t value) {
  if (width == Width::k16) {
    w.result<uint16_t>(row)[lane] = static_cast<uint16_t>(value);
  } else if (width == Width::k32) {
    w.result<uint32_t>(row)[lane] = static_cast<uint32_t>(value);
  } else {
    w.result<uint64_t>(row)[lane] = value;
  }
}

// `bytes` of the source count, and `count` of the destination's type, which a wider register takes as they extend.
void convert_integer(Warp& w, const Instruction& in, uint32_t active) {
  const auto extended = [](uint64_t value, int bytes, bool is_signed) {
    const int unused = 64 - 8 * bytes;
    return is_signed ? static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused) : value << unused >> unused;
  };
  for_lanes(active, [&](int l) {
    const uint64_t value = extended(value_of(w, in.from[0], in.address_width, l), in.bytes, in.is_signed);
    set_value(w, in.to[0], in.value_width, l, extended(value, in.count, in.mode != 0));
  });
}

void unpack(Warp& w, const Instruction& in, uint32_t active) {
  for_lanes(active, [&](int l) {
    const uint64_t whole = value_of(w, in.from[0], in.value_width, l);
    for (int i = 0; i < in.count; i++) {
      set_value(w, in.to[i], in.bytes == 2 ? Width::k16 : Width::k32, l, whole >> (8 * in.bytes * i));
    }
  });
}

void pack(Warp& w, const Instruction& in, uint32_t active) {
  for_lanes(active, [&](int l) {
    uint64_t whole = 0;
    for (int i = 0; i < in.count; i++) {
      whole |= value_of(w, in.from[i], in.bytes == 2 ? Width::k16 : Width::k32, l) << (8 * in.bytes * i);
    }
    set_value(w, in.to[0], in.value_width, l, whole);
  });
}

}  // namespace madkernels::simulator
