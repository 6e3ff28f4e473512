// Argument checks and small tensor helpers for the ops' entries: the files that see tensors. Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/strided.h"
#include "common/turns.h"

// An op's entry is compiled for up to three libraries: the CPU's, CUDA's, and the simulator's, which runs the CUDA kernels
// without a GPU; its build gives MADKERNELS_LIBRARY, the namespace of its ops, and MADKERNELS_KEY. Only the registrations
// and what is launched differ. CUDA's library has no schemas: its ops are those that the CPU's defines.
#ifdef MADKERNELS_CUDA
#define MADKERNELS_GPU 1
#else
#define MADKERNELS_GPU 0
#endif
#ifdef MADKERNELS_LIBRARY
#define MADKERNELS_DEFINES_SCHEMA 1
#elif MADKERNELS_GPU
#define MADKERNELS_LIBRARY madkernels
#define MADKERNELS_KEY CUDA
#define MADKERNELS_DEFINES_SCHEMA 0
#else
#define MADKERNELS_LIBRARY madkernels
#define MADKERNELS_KEY CPU
#define MADKERNELS_DEFINES_SCHEMA 1
#endif

namespace madkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;
using Shape = std::vector<int64_t>;

// MK_CHECK(condition, parts of a message...): the message says which argument, what it got and what it takes.
#define MK_CHECK(condition, ...)                                                        \
  do {                                                                                  \
    if (!(condition)) throw std::runtime_error(::madkernels::concatenate(__VA_ARGS__)); \
  } while (0)

template <class... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return message.str();
}

inline std::string to_string(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); i++) text << (i ? ", " : "") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

inline Shape shape_of(const Tensor& t) {
  Shape shape;
  for (int64_t i = 0; i < t.dim(); i++) shape.push_back(t.size(i));
  return shape;
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "a dtype of another kind";
  }
}

// The arguments of one step of decoding have no time axis: they are checked and worked on with one of length 1.
inline Tensor with_time(const Tensor& t) { return t.dim() > 0 ? torch::stable::unsqueeze(t, 1) : t; }
inline OptionalTensor with_time(const OptionalTensor& t) { return t ? OptionalTensor(with_time(*t)) : std::nullopt; }
inline Shape without_axis(Shape shape, size_t axis) {
  if (shape.size() > axis) shape.erase(shape.begin() + static_cast<int64_t>(axis));
  return shape;
}

// What messages call the arguments of an op, or of its step, which takes (batch, dim) for rows and `state` for the initial
// state.
struct Spelling {
  bool step = false;

  const char* state() const { return step ? "state" : "initial_state"; }
  const char* rows() const { return step ? "(batch, dim)" : "(batch, seqlen, dim)"; }
  std::string shape(const Shape& with_time) const { return to_string(step ? without_axis(with_time, 1) : with_time); }
};

// Checks the arguments of one op against its first tensor.
class Checks {
 public:
  Checks(const char* op, const char* name, const Tensor& like, Spelling spelling = {})
      : op_(op), first_(name), like_(like), spelling_(spelling) {
    constexpr int64_t kMostOnGpu = INT32_MAX;  // indices of kernels there are int, offsets 64-bit
    for (int64_t i = 0; MADKERNELS_GPU && i < like.dim(); i++) {
      MK_CHECK(like.size(i) <= kMostOnGpu, op_, ": ", first_, " has an axis of ", like.size(i), "; a GPU takes up to ",
               kMostOnGpu);
    }
  }

  // The dtype of the activations, as kernels know it.
  DType dtype() const {
    switch (like_.scalar_type()) {
      case ScalarType::Float: return DType::kFloat32;
      case ScalarType::BFloat16: return DType::kBFloat16;
      case ScalarType::Half: return DType::kFloat16;
      case ScalarType::Double:
        MK_CHECK(!MADKERNELS_GPU, op_, ": ", first_, " has dtype float64, which the CPU takes; a GPU takes float32, ",
                 "bfloat16 or float16");
        return DType::kFloat64;
      default: break;
    }
    MK_CHECK(false, op_, ": ", first_, " has dtype ", name_of(like_.scalar_type()),
             "; it takes float32, bfloat16, float16 or float64");
    return DType::kFloat32;
  }
  // What states and per-channel parameters are held in.
  ScalarType accumulate_type() const {
    return like_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  void shape(const char* name, const Tensor& t, const Shape& wanted, Spelling spelling = {}) const {
    const Shape got = shape_of(t);
    MK_CHECK(got == wanted, op_, ": ", name, " has shape ", spelling.shape(got), "; expected ", spelling.shape(wanted));
    MK_CHECK(t.device() == like_.device(), op_, ": ", name, " is on another device than ", first_);
  }
  void type(const char* name, const Tensor& t, std::initializer_list<ScalarType> wanted) const {
    std::string names;
    for (ScalarType type : wanted) {
      if (t.scalar_type() == type) return;
      if (names == name_of(type)) continue;
      names += (names.empty() ? "" : " or ") + std::string(name_of(type));
    }
    MK_CHECK(false, op_, ": ", name, " has dtype ", name_of(t.scalar_type()), "; with ", first_, " in ",
             name_of(like_.scalar_type()), " it takes ", names);
  }
  void tensor(const char* name, const Tensor& t, const Shape& wanted, ScalarType dtype) const {
    shape(name, t, wanted);
    type(name, t, {dtype});
  }
  void tensor(const char* name, const OptionalTensor& t, const Shape& wanted, ScalarType dtype) const {
    if (t) tensor(name, *t, wanted, dtype);
  }
  // Activations, with the time axis that a step's lack; in the dtype of the first.
  void activation(const char* name, const Tensor& t, const Shape& wanted) const {
    shape(name, t, wanted, spelling_);
    type(name, t, {like_.scalar_type()});
  }
  void activation(const char* name, const OptionalTensor& t, const Shape& wanted) const {
    if (t) activation(name, *t, wanted);
  }

  // The documents of `cu_seqlens`; without it, one sequence a batch row. Its values are looked at on the CPU only, where
  // that costs no synchronisation; kernels on a GPU stay inside the row whatever they are.
  Documents documents(const OptionalTensor& cu_seqlens, int64_t batch, int64_t seqlen,
                      const char* name = "cu_seqlens") const {
    if (!cu_seqlens) return {.cu_seqlens = nullptr, .count = batch, .seqlen = seqlen};
    const Tensor& offsets = *cu_seqlens;
    MK_CHECK(batch == 1, op_, ": ", name, " packs documents along one row; expected batch 1, got ", batch);
    MK_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, op_, ": ", name, " has shape ", to_string(shape_of(offsets)),
             "; expected (num_docs + 1,)");
    shape(name, offsets, shape_of(offsets));
    type(name, offsets, {ScalarType::Int});
    MK_CHECK(offsets.size(0) == 1 || offsets.stride(0) == 1, op_, ": ", name, " must be contiguous");
    const auto* values = static_cast<const int32_t*>(offsets.data_ptr());
    const int64_t count = offsets.size(0) - 1;
    MK_CHECK(count > 0 || seqlen == 0, op_, ": ", name, " has no document; the seqlen is ", seqlen);
    if (!MADKERNELS_GPU) {
      MK_CHECK(values[0] == 0, op_, ": ", name, " starts with ", values[0], "; expected 0");
      for (int64_t i = 0; i < count; i++) {
        MK_CHECK(values[i] <= values[i + 1], op_, ": ", name, " falls from ", values[i], " to ", values[i + 1], " at index ",
                 i + 1);
      }
      MK_CHECK(values[count] == seqlen, op_, ": ", name, " ends with ", values[count], "; expected the seqlen, ", seqlen);
    }
    return {.cu_seqlens = values, .count = count, .seqlen = seqlen};
  }

 private:
  const char* op_;
  const char* first_;
  const Tensor& like_;
  Spelling spelling_;
};

// The activation of a name, gated or not; of none, none.
inline Epilogue epilogue_of(const char* op, const std::optional<std::string>& name) {
  static constexpr std::pair<const char*, Epilogue> kKnown[] = {
      {"silu", {Activation::kSilu, false}},   {"gelu", {Activation::kGelu, false}},  {"relu", {Activation::kRelu, false}},
      {"relu2", {Activation::kRelu2, false}}, {"swiglu", {Activation::kSilu, true}}, {"geglu", {Activation::kGelu, true}},
      {"reglu", {Activation::kRelu, true}}};
  if (!name) return {Activation::kNone, false};
  std::string names;
  for (const auto& [known, epilogue] : kKnown) {
    if (*name == known) return epilogue;
    names += std::string(known) + ", ";
  }
  MK_CHECK(false, op, ": activation is \"", *name, "\"; it takes ", names, "or None");
  return {};
}

// [batch, seqlen, dim] as kernels take it: one of the last two axes dense. Others are copied.
inline Tensor with_dense_axis(const Tensor& t) {
  return t.stride(1) == 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
}
// [rows, channels] as kernels take it: with dense channels.
inline Tensor with_dense_channels(const Tensor& t) { return t.stride(1) == 1 ? t : torch::stable::contiguous(t); }
// Memory for rows like t, (batch, seqlen, dim), dense along the axis along which t is: never with the strides of t itself,
// which may overlap where t is an expanded view.
inline Tensor empty_rows(const Tensor& t) {
  const Shape shape = shape_of(t);
  if (t.stride(2) == 1) return torch::stable::new_empty(t, shape);
  return torch::stable::transpose(torch::stable::new_empty(t, Shape{shape[0], shape[2], shape[1]}), 1, 2);
}
inline Rows rows_of(const Tensor& t) {
  return {.data = t.data_ptr(), .batch_stride = t.stride(0), .time_stride = t.stride(1), .channel_stride = t.stride(2)};
}
inline Projection projection_of(const Tensor& t) {
  return {.data = t.data_ptr(),
          .batch_stride = t.stride(0),
          .time_stride = t.stride(1),
          .group_stride = t.stride(2),
          .state_stride = t.stride(3)};
}

inline Heads heads_of(const Tensor& t) {
  return {.data = t.data_ptr(),
          .batch_stride = t.stride(0),
          .time_stride = t.stride(1),
          .head_stride = t.stride(2),
          .dim_stride = t.stride(3)};
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }
inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}
inline Tensor empty(const Shape& shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, shape, dtype);
}
// The same, where it is large in pages of 2 MiB, if the system gives them when asked: the first touch of as many small ones
// can take as long as a product.
inline Tensor empty_in_large_pages(const Shape& shape, ScalarType dtype, const Tensor& like) {
  Tensor t = empty(shape, dtype, like);
#if defined(MADV_HUGEPAGE) && !MADKERNELS_GPU
  constexpr uintptr_t kPage = 4096, kLarge = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr()), first = (begin + kPage - 1) / kPage * kPage;
  const auto end = (begin + static_cast<uintptr_t>(t.numel()) * static_cast<uintptr_t>(t.element_size())) / kPage * kPage;
  if (end > first + kLarge) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // or it stays as it is
#endif
  return t;
}

// Sums `parts` over `axis`, in order, whatever the threads.
Tensor sum_parts(const Tensor& parts, int64_t axis);

// Fills the states of documents without a step, as empty_documents.h says: `to` from `from`, both [docs, rows, dim] and
// contiguous.
void hand_on_states(const Documents& docs, const OptionalTensor& from, const Tensor& to);

// Items a thread should take at least: about 100 microseconds of work where an item costs `operations`.
inline int64_t grain(int64_t operations) { return operations >= 500000 ? 1 : 500000 / (operations + 1) + 1; }

// f(turns) in every thread, over so many items of `each` operations.
template <class F>
void in_turns(int64_t count, int64_t each, F&& f) {
  int64_t taken = 0;
  const Turns turns{count, &taken};
  torch::stable::parallel_for(0, count, grain(each), [&](int64_t, int64_t) { f(turns); });
}

// Memory for packed copies, aligned to a cache line.
class Packed {
 public:
  Packed(int64_t bytes, const Tensor& like) : memory_(empty_in_large_pages({bytes + 64}, ScalarType::Byte, like)) {}
  void* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  Tensor memory_;
};

}  // namespace madkernels
