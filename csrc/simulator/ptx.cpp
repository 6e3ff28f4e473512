#include "simulator/ptx.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <utility>

namespace madkernels::simulator {
namespace {

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

int aligned(int offset, int to) { return (offset + to - 1) / to * to; }

// Comments become spaces, so that places stay what they are. Names of files, in quotes, may have two slashes.
std::string without_comments(std::string text) {
  bool quoted = false;
  for (size_t i = 0; i + 1 < text.size(); i++) {
    quoted ^= text[i] == '"';
    const bool line = text[i] == '/' && text[i + 1] == '/', block = text[i] == '/' && text[i + 1] == '*';
    if (quoted || !(line || block)) continue;
    size_t end = line ? text.find('\n', i) : text.find("*/", i + 2);
    end = end == std::string::npos ? text.size() : end + (line ? 0 : 2);
    for (; i < end; i++) {
      if (text[i] != '\n') text[i] = ' ';
    }
  }
  return text;
}

// Walks over the text word by word and counts lines.
class Reader {
 public:
  Reader(const std::string& path, const std::string& text, size_t at) : path_(path), text_(text), at_(at) {
    line_ = 1 + static_cast<int>(std::count(text.begin(), text.begin() + static_cast<long>(at), '\n'));
  }

  int line() const { return line_; }
  char next() {
    skip_spaces();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (next() != c) return false;
    step();
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(std::string("expected ") + c);
  }
  std::string word() {
    skip_spaces();
    const size_t begin = at_;
    while (at_ < text_.size() && (is_word(text_[at_]) || text_.compare(at_, 2, "::") == 0)) {
      at_ += text_[at_] == ':' ? 2 : 1;
    }
    if (at_ == begin) fail("expected a word");
    return text_.substr(begin, at_ - begin);
  }
  int number() { return std::atoi(word().c_str()); }
  // What stands before `end`, which is passed over.
  std::string until(char end) {
    std::string found;
    while (at_ < text_.size() && text_[at_] != end) found += step();
    if (at_ == text_.size()) fail(std::string("expected ") + end);
    step();
    return found;
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + ":" + std::to_string(line_) + ": PTX that is not understood: " + what);
  }

 private:
  char step() {
    if (text_[at_] == '\n') line_++;
    return text_[at_++];
  }
  void skip_spaces() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) step();
  }

  const std::string& path_;
  const std::string& text_;
  size_t at_;
  int line_ = 1;
};

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n"), end = text.find_last_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

// Cut at the commas outside of braces and brackets.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& part : parts) part = trimmed(part);
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}

// ".align 8 .b8 name[336]" or ".u64 name", without its place.
struct Declared {
  std::string name;
  int align, bytes;
};
Declared read_variable(Reader& in) {
  std::string word = in.word();
  int align = 0;
  if (word == ".align") align = in.number(), word = in.word();
  const int size = bytes_of_type(std::string_view(word).substr(1));
  if (size == 0) in.fail("the type " + word);
  while (in.next() == '.') in.word();  // .ptr .global .align 4, of parameters
  const std::string name = in.word();
  int count = 1;
  if (in.take('[')) {
    count = in.next() == ']' ? 0 : in.number();
    in.expect(']');
  }
  return {name, align > 0 ? align : size, size * count};
}

// The body of a kernel: scopes, declarations, labels, instructions.
class Body {
 public:
  Body(Reader& in, KernelText& kernel) : in_(in), kernel_(kernel) {}

  void read() {
    in_.expect('{');
    scopes_.emplace_back();
    while (!scopes_.empty()) {
      if (in_.take('{')) {
        scopes_.emplace_back();
      } else if (in_.take('}')) {
        scopes_.pop_back();
      } else if (in_.next() == '.') {
        directive();
      } else {
        statement();
      }
    }
  }

 private:
  void directive() {
    const std::string word = in_.word();
    if (word == ".reg") {
      registers();
    } else if (word == ".shared") {
      const Declared d = read_variable(in_);
      in_.expect(';');
      kernel_.shared_bytes = aligned(kernel_.shared_bytes, std::max(d.align, 1));
      kernel_.shared.push_back({d.name, kernel_.shared_bytes, d.bytes});
      kernel_.shared_bytes += d.bytes;
    } else if (word == ".loc") {
      place();
    } else if (word == ".pragma") {
      in_.until(';');
    } else {
      in_.fail("the directive " + word);
    }
  }

  // 3 409 8, function_name $L__info_string0, inlined_at 1 95 3
  void place() {
    const int file = in_.number();
    source_ = {file, in_.number()}, outside_ = {};
    const std::string rest = in_.until('\n');
    const size_t inlined = rest.find("inlined_at");
    if (inlined != std::string::npos)
      std::sscanf(rest.c_str() + inlined, "inlined_at %d %d", &outside_.file, &outside_.line);
  }

  void registers() {
    const std::string type = in_.word().substr(1);
    do {
      const std::string name = in_.word();
      if (in_.take('<')) {
        const int count = in_.number();
        in_.expect('>');
        for (int i = 0; i < count; i++) declare(name + std::to_string(i), type);
      } else {
        declare(name, type);
      }
    } while (in_.take(','));
    in_.expect(';');
  }

  // A name of an inner scope may stand for another register than outside.
  void declare(const std::string& name, const std::string& type) {
    const std::string full = scopes_.size() == 1 ? name : name + "@" + std::to_string(kernel_.registers.size());
    kernel_.registers.push_back({full, type});
    if (scopes_.size() > 1) scopes_.back()[name] = full;
  }

  void statement() {
    Statement s;
    s.line = in_.line(), s.source = source_, s.outside = outside_;
    if (in_.take('@')) {
      s.negated = in_.take('!');
      s.guard = resolved(in_.word());
    }
    s.name = in_.word();
    if (in_.take(':')) {
      s.operands = {s.name}, s.name = "label:";
    } else {
      for (const std::string& operand : split(in_.until(';'))) s.operands.push_back(resolved(operand));
    }
    kernel_.statements.push_back(std::move(s));
  }

  // Names of inner scopes replaced by the registers' own.
  std::string resolved(const std::string& operand) const {
    if (scopes_.size() < 2) return operand;
    std::string result;
    for (size_t i = 0; i < operand.size();) {
      size_t end = i;
      while (end < operand.size() && is_word(operand[end])) end++;
      const std::string word = operand.substr(i, std::max<size_t>(end - i, 1));
      result += register_of(word).value_or(word);
      i += word.size();
    }
    return result;
  }
  std::optional<std::string> register_of(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    }
    return std::nullopt;
  }

  Reader& in_;
  KernelText& kernel_;
  std::vector<std::map<std::string, std::string>> scopes_;
  SourceLine source_, outside_;
};

void read_parameters(Reader& in, KernelText& kernel) {
  in.expect('(');
  while (!in.take(')')) {
    if (in.word() != ".param") in.fail("expected .param");
    const Declared d = read_variable(in);
    const int offset = aligned(kernel.parameter_bytes, d.align);
    kernel.parameters.push_back({d.name, offset, d.bytes});
    kernel.parameter_bytes = offset + d.bytes;
    in.take(',');
  }
}

// .maxntid 128 and others, which limit what ptxas gives to a thread.
void read_limits(Reader& in, KernelText& kernel) {
  while (in.next() == '.') {
    const bool threads = in.word() == ".maxntid";
    int product = 1;
    do product *= in.number();
    while (in.take(','));
    if (threads) kernel.most_threads = product;
  }
}

}  // namespace

int bytes_of_type(std::string_view type) {
  static const std::map<std::string_view, int> kBytes = {
      {"b8", 1},   {"u8", 1},  {"s8", 1},  {"b16", 2}, {"u16", 2}, {"s16", 2},   {"f16", 2},
      {"bf16", 2}, {"b32", 4}, {"u32", 4}, {"s32", 4}, {"f32", 4}, {"f16x2", 4}, {"bf16x2", 4},
      {"tf32", 4}, {"b64", 8}, {"u64", 8}, {"s64", 8}, {"f64", 8},
  };
  const auto found = kBytes.find(type);
  return found == kBytes.end() ? 0 : found->second;
}

Module::Module(std::string path, std::string text) : path_(std::move(path)), text_(without_comments(std::move(text))) {
  for (size_t at = 0; (at = text_.find(".entry", at)) != std::string::npos;) {
    Reader in(path_, text_, at += 6);
    names_.push_back(in.word());
    begins_[names_.back()] = at;
  }
  for (size_t at = 0; (at = text_.find(".extern .shared", at)) != std::string::npos;) {
    Reader in(path_, text_, at += 15);
    outer_shared_.push_back(read_variable(in).name);
  }
  for (size_t at = 0; (at = text_.find("\n\t.file", at)) != std::string::npos;) {
    Reader in(path_, text_, at += 7);
    const int number = in.number();
    in.expect('"');
    files_[number] = in.until('"');
  }
}

KernelText Module::read(const std::string& name) const {
  Reader in(path_, text_, begins_.at(name));
  KernelText kernel;
  kernel.name = in.word(), kernel.line = in.line();
  if (in.next() == '(') read_parameters(in, kernel);
  read_limits(in, kernel);
  Body(in, kernel).read();
  kernel.shared_bytes = aligned(kernel.shared_bytes, 16);
  for (const std::string& array : outer_shared_) kernel.shared.push_back({array, kernel.shared_bytes, 0});
  return kernel;
}

std::string Module::name_of(const SourceLine& place) const {
  const auto found = files_.find(place.file);
  if (found == files_.end() || found->second.find("/include/") != std::string::npos) return "";
  const std::string& path = found->second;
  for (const char* folder : {"csrc/", "tests/"}) {
    const size_t at = path.rfind(folder);
    if (at != std::string::npos) return path.substr(at) + ":" + std::to_string(place.line);
  }
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line);
}

}  // namespace madkernels::simulator
