// The text of PTX, cut into kernels and statements. What a statement means is not known here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace madkernels::simulator {

// Sizes in bytes of a value of .b8, .u16, .f32 and so on; 0 if `type` is none.
int bytes_of_type(std::string_view type);

struct Variable {
  std::string name;
  int offset, bytes;
};

struct Register {
  std::string name;
  std::string type;  // pred, b16, f32, ..
};

struct SourceLine {
  int file = 0, line = 0;  // number of a .file; 0 where not known
};

struct Statement {
  int line = 0;                // in the PTX
  SourceLine source, outside;  // in the CUDA source; where the function that it is in was inlined
  std::string guard;           // register of "@%p1" or "@!%p1", without "@" and "!"
  bool negated = false;
  std::string name;  // of the instruction, with its modifiers; "label:" for a label
  std::vector<std::string> operands;
};

struct KernelText {
  std::string name;
  int line = 1;
  std::vector<Variable> parameters;
  int parameter_bytes = 0;
  int most_threads = 1024;  // .maxntid, multiplied out
  std::vector<Variable> shared;
  int shared_bytes = 0;  // static; what a launch gives begins behind it, aligned to 16
  std::vector<Register> registers;
  std::vector<Statement> statements;  // operands name registers as in `registers`
};

// A file of PTX. Kernels are found at once and cut up one by one when asked for.
class Module {
 public:
  Module(std::string path, std::string text);

  const std::string& path() const { return path_; }
  const std::vector<std::string>& kernels() const { return names_; }
  // Throws std::runtime_error with file and line where the text is not understood.
  KernelText read(const std::string& kernel) const;
  // "csrc/common/warp.h:57"; "" where it is not known or in CUDA's own headers.
  std::string name_of(const SourceLine& place) const;

 private:
  std::string path_, text_;
  std::vector<std::string> names_;
  std::map<std::string, size_t> begins_;   // of a kernel's name in the text
  std::vector<std::string> outer_shared_;  // arrays whose size a launch gives
  std::map<int, std::string> files_;
};

}  // namespace madkernels::simulator
