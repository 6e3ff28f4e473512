// From statements to instructions. Whatever is not known is refused by name.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <optional>
#include <stdexcept>
#include <unordered_map>

#include "simulator/instructions.h"
#include "simulator/warp.h"

namespace madkernels::simulator {
namespace {

bool begins(const std::string& text, const std::string& with) { return text.compare(0, with.size(), with) == 0; }

std::vector<std::string> parts_of(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == at) {
      parts.emplace_back();
    } else if (c != ' ' && c != '\t' && c != '\n') {
      parts.back() += c;
    }
  }
  return parts;
}

// "{%r1, %r2}" -> its parts; anything else is the one part.
std::vector<std::string> parts_of_vector(const std::string& operand) {
  return operand[0] == '{' ? parts_of(operand.substr(1, operand.size() - 2), ',') : std::vector<std::string>{operand};
}

std::optional<Width> width_of_type(const std::string& type) {
  if (type == "pred") return Width::kPredicate;
  switch (bytes_of_type(type)) {
    case 1:  // registers of 8 bits are kept as 16
    case 2: return Width::k16;
    case 4: return Width::k32;
    case 8: return Width::k64;
    default: return std::nullopt;
  }
}

}  // namespace

class Decoder {
 public:
  explicit Decoder(Kernel& kernel) : kernel_(kernel) {
    for (const Register& r : kernel.text.registers) {
      numbers_[r.name] = static_cast<int>(widths_.size());
      widths_.push_back(*width_of_type(r.type));
    }
    for (const Variable& v : kernel.text.parameters) symbols_[v.name] = v.offset;
    for (const Variable& v : kernel.text.shared) symbols_[v.name] = v.offset;
  }

  void run() {
    for (size_t i = 0; i < kernel_.text.statements.size(); i++) {
      statement_ = &kernel_.text.statements[i];
      if (statement_->name == "label:") {
        labels_[statement_->operands[0]] = static_cast<int>(kernel_.code.size());
        continue;
      }
      Instruction in;
      in.text = static_cast<int>(i);
      if (!statement_->guard.empty()) in.guard = register_of(statement_->guard, Width::kPredicate);
      in.negated = statement_->negated;
      decode(in);
      kernel_.code.push_back(in);
    }
    finish();
  }

 private:
  const std::string& name() const { return statement_->name; }
  const std::string& operand(size_t i) const {
    if (i >= statement_->operands.size()) refuse("it has too few operands");
    return statement_->operands[i];
  }
  size_t operands() const { return statement_->operands.size(); }
  [[noreturn]] void refuse(const std::string& why) const {
    throw std::runtime_error("kernel " + kernel_.short_name() + ": the instruction " + name() + " is not simulated: " + why +
                             " (" + kernel_.module->path() + ":" + std::to_string(statement_->line) + ")");
  }

  // ---- operands ----

  std::optional<Width> width_of_register(const std::string& text) const {
    const auto found = numbers_.find(text);
    return found == numbers_.end() ? std::nullopt : std::optional(widths_[static_cast<size_t>(found->second)]);
  }
  int register_of(const std::string& text, Width width) const {
    const auto found = numbers_.find(text);
    if (found == numbers_.end()) refuse("there is no register " + text);
    if (widths_[static_cast<size_t>(found->second)] != width) refuse("the register " + text + " has another width");
    return found->second;
  }

  // A row with the same value in every lane -> ~offset.
  int constant(uint64_t value, Width width) {
    const auto [found, fresh] = constants_.try_emplace({value, width}, static_cast<int>(kernel_.constants.size() * 8));
    if (fresh) {
      uint64_t word = value;
      if (width == Width::k16) word = (value & 0xffff) * 0x0001000100010001u;
      if (width == Width::k32) word = (value & 0xffffffffu) * 0x0000000100000001u;
      if (width == Width::kPredicate) word = value != 0 ? ~uint64_t{0} : 0;
      const auto words = static_cast<size_t>(std::max(bytes_of_row(width), 64)) / 8;
      kernel_.constants.insert(kernel_.constants.end(), words, word);
    }
    return ~found->second;
  }

  int special(const std::string& text) {
    static const std::map<std::string, Special::Kind> kKinds = {
        {"%tid", Special::Kind::kThread},    {"%ntid", Special::Kind::kThreads}, {"%ctaid", Special::Kind::kBlock},
        {"%nctaid", Special::Kind::kBlocks}, {"%laneid", Special::Kind::kLane},
    };
    const auto [found, fresh] = specials_.try_emplace(text, static_cast<int>(widths_.size()));
    if (fresh) {
      const auto kind = kKinds.find(text.substr(0, text.find('.')));
      if (kind == kKinds.end()) refuse("the special register " + text + " is not simulated");
      widths_.push_back(Width::k32);
      kernel_.specials.push_back({kind->second, text.back() == 'y' ? 1 : text.back() == 'z' ? 2 : 0, found->second});
    }
    return found->second;
  }

  // A register, a number, a special register, or the address of a symbol.
  int source_of(const std::string& text, Width width) {
    if (numbers_.count(text) != 0) return register_of(text, width);
    if (text[0] == '%') {
      if (width != Width::k32) refuse("the special register " + text + " has another width");
      return special(text);
    }
    if (begins(text, "0f") || begins(text, "0F")) return constant(std::stoul(text.substr(2), nullptr, 16), width);
    if (begins(text, "0d") || begins(text, "0D")) return constant(std::stoull(text.substr(2), nullptr, 16), width);
    if (text[0] == '-') return constant(static_cast<uint64_t>(std::stoll(text, nullptr, 0)), width);
    if (std::isdigit(static_cast<unsigned char>(text[0]))) return constant(std::stoull(text, nullptr, 0), width);
    const auto symbol = symbols_.find(text);
    if (symbol == symbols_.end()) refuse("the operand " + text);
    return constant(static_cast<uint64_t>(symbol->second), width);
  }
  int source(size_t i, Width width) { return source_of(operand(i), width); }
  void add_source(Instruction& in, int row) { in.from[in.sources++] = row; }
  void add_result(Instruction& in, const std::string& text, Width width) { in.to[in.results++] = register_of(text, width); }

  // [register + number], [symbol + number] -> the next source, or none, and in.offset.
  void add_address(Instruction& in, const std::string& text, bool keep_width = true) {
    if (text.front() != '[' || text.back() != ']') refuse("the address " + text);
    for (const std::string& part : parts_of(text.substr(1, text.size() - 2), '+')) {
      if (const std::optional<Width> width = width_of_register(part)) {
        add_source(in, register_of(part, *width));
        if (keep_width) in.address_width = *width;
      } else if (const auto symbol = symbols_.find(part); symbol != symbols_.end()) {
        in.offset += symbol->second;
      } else {
        in.offset += std::stoll(part, nullptr, 0);
      }
    }
  }

  // ---- instructions ----

  void decode(Instruction& in) {
    if (decode_elementwise(in)) return;
    static const std::vector<std::pair<std::string, void (Decoder::*)(Instruction&)>> kKinds = {
        {"ld.", &Decoder::decode_load},
        {"st.", &Decoder::decode_store},
        {"bra", &Decoder::decode_branch},
        {"ret", &Decoder::decode_return},
        {"exit", &Decoder::decode_return},
        {"bar.warp.sync", &Decoder::decode_sync_warp},
        {"bar.sync", &Decoder::decode_barrier},
        {"barrier.sync", &Decoder::decode_barrier},
        {"shfl.sync.", &Decoder::decode_shuffle},
        {"vote.sync.", &Decoder::decode_vote},
        {"cp.async.", &Decoder::decode_copy},
        {"ldmatrix.", &Decoder::decode_matrices},
        {"mma.sync.aligned.", &Decoder::decode_product},
        {"atom.", &Decoder::decode_atomic},
        {"red.", &Decoder::decode_atomic},
        {"cvt.", &Decoder::decode_integer_conversion},
        {"mov.b", &Decoder::decode_pack},
    };
    for (const auto& [prefix, decode_kind] : kKinds) {
      if (begins(name(), prefix)) return (this->*decode_kind)(in);
    }
    refuse("it is not known");
  }

  bool decode_elementwise(Instruction& in) {
    static const std::map<std::string, Form>& table = elementwise_instructions();
    const auto found = table.find(name());
    if (found == table.end()) return false;
    if (begins(name(), "mov.b") && (operand(0)[0] == '{' || operand(1)[0] == '{')) return false;
    const Form& form = found->second;
    if (begins(name(), "cvt.")) {  // registers may be wider than the types: decode_integer_conversion takes them
      const std::optional<Width> to = width_of_register(operand(0)), from = width_of_register(operand(1));
      if (to != form.widths[0] || (from && from != form.widths[1])) return false;
    }
    if (operands() != form.widths.size()) refuse("it has another number of operands here");
    in.run = form.run;
    add_result(in, operand(0), form.widths[0]);
    for (size_t i = 1; i < form.widths.size(); i++) add_source(in, source(i, form.widths[i]));
    return true;
  }

  // Where an access goes, its type and count, from the parts of its name; hints to caches change nothing here.
  void decode_access(Instruction& in, const std::vector<std::string>& parts) {
    in.space = Space::kGeneric;
    for (size_t i = 1; i + 1 < parts.size(); i++) {
      const std::string& part = parts[i];
      if (part == "global") {
        in.space = Space::kGlobal;
      } else if (part == "shared" || part == "shared::cta") {
        in.space = Space::kShared;
      } else if (part == "param") {
        in.space = Space::kParameter;
      } else if (part == "v2" || part == "v4") {
        in.count = static_cast<uint8_t>(part[1] - '0');
      } else if (part != "nc" && part != "ca" && part != "cg" && part != "cs" && part != "wb" && !begins(part, "L1::") &&
                 !begins(part, "L2::")) {
        refuse("the modifier " + part);
      }
    }
    in.bytes = static_cast<uint8_t>(bytes_of_type(parts.back()));
    in.is_signed = parts.back()[0] == 's';
    if (in.bytes == 0) refuse("the type " + parts.back());
    // What accesses of one kernel have in common decides how finely races are looked for.
    int& granule = kernel_.granule[in.space == Space::kShared ? 1 : 0];
    if (in.space != Space::kParameter) granule = std::min<int>(granule, in.bytes);
    if (in.space == Space::kGeneric) kernel_.granule[1] = std::min<int>(kernel_.granule[1], in.bytes);
  }

  std::optional<Width> width_of_values(const std::vector<std::string>& values) const {
    std::optional<Width> width;
    for (const std::string& value : values) {
      if (const std::optional<Width> own = width_of_register(value)) width = own;
    }
    return width;
  }

  void decode_load(Instruction& in) {
    decode_access(in, parts_of(name(), '.'));
    in.run = &load;
    const std::vector<std::string> values = parts_of_vector(operand(0));
    if (values.size() != in.count) refuse("it has another number of values");
    in.value_width = width_of_values(values).value_or(Width::k32);
    if (bytes_of_row(in.value_width) < 32 * in.bytes) refuse("its registers are too narrow");
    for (const std::string& value : values) add_result(in, value, in.value_width);
    add_address(in, operand(1));
  }

  void decode_store(Instruction& in) {
    decode_access(in, parts_of(name(), '.'));
    in.run = &store;
    const std::vector<std::string> values = parts_of_vector(operand(1));
    if (values.size() != in.count) refuse("it has another number of values");
    in.value_width = width_of_values(values).value_or(in.bytes == 8 ? Width::k64 : in.bytes == 4 ? Width::k32 : Width::k16);
    if (bytes_of_row(in.value_width) < 32 * in.bytes) refuse("its registers are too narrow");
    add_address(in, operand(0));
    in.sources = 1;  // an absent register of the address keeps its place
    for (const std::string& value : values) add_source(in, source_of(value, in.value_width));
  }

  void decode_branch(Instruction& in) {
    if (name() != "bra" && name() != "bra.uni") refuse("it is not known");
    in.flow = Flow::kBranch;
    jumps_.emplace_back(kernel_.code.size(), operand(0));
  }
  void decode_return(Instruction& in) { in.flow = Flow::kReturn; }

  void decode_barrier(Instruction& in) {
    if (operands() != 1 || operand(0) != "0") refuse("only barrier 0 of all threads is");
    in.flow = Flow::kBarrier;
  }

  // An exchange whose last source is the mask of its lanes.
  void begin_exchange(Instruction& in, Run run) { in.flow = Flow::kExchange, in.run = run; }
  void add_mask(Instruction& in, size_t i) {
    in.mask = in.sources;
    add_source(in, source(i, Width::k32));
  }

  void decode_sync_warp(Instruction& in) {
    begin_exchange(in, &sync_warp);
    add_mask(in, 0);
  }

  void decode_shuffle(Instruction& in) {
    static const std::map<std::string, Shuffle> kModes = {
        {"up", Shuffle::kUp}, {"down", Shuffle::kDown}, {"bfly", Shuffle::kXor}, {"idx", Shuffle::kFrom}};
    begin_exchange(in, &shuffle);
    in.mode = static_cast<uint8_t>(kModes.at(parts_of(name(), '.')[2]));
    const std::vector<std::string> results = parts_of(operand(0), '|');
    add_result(in, results[0], Width::k32);
    if (results.size() > 1) add_result(in, results[1], Width::kPredicate);
    for (size_t i = 1; i < 4; i++) add_source(in, source(i, Width::k32));
    add_mask(in, 4);
  }

  void decode_vote(Instruction& in) {
    static const std::map<std::string, Vote> kModes = {
        {"ballot", Vote::kBallot}, {"any", Vote::kAny}, {"all", Vote::kAll}, {"uni", Vote::kUniform}};
    begin_exchange(in, &vote);
    const Vote kind = kModes.at(parts_of(name(), '.')[2]);
    in.mode = static_cast<uint8_t>(kind);
    add_result(in, operand(0), kind == Vote::kBallot ? Width::k32 : Width::kPredicate);
    if (operand(1)[0] == '!') refuse("a negated operand");
    add_source(in, source(1, Width::kPredicate));
    add_mask(in, 2);
  }

  void decode_copy(Instruction& in) {
    if (name() == "cp.async.commit_group") {
      in.run = &commit_copies;
    } else if (name() == "cp.async.wait_group" || name() == "cp.async.wait_all") {
      in.run = &wait_for_copies;
      in.mode = name() == "cp.async.wait_all";
      in.offset = in.mode != 0 ? 0 : std::stoi(operand(0));
    } else if (begins(name(), "cp.async.ca.shared") || begins(name(), "cp.async.cg.shared")) {
      in.run = &copy_later;
      in.space = Space::kShared;
      add_address(in, operand(0));
      if (in.address_width != Width::k32) refuse("an address of shared memory in 64 bits");
      const int64_t offset = in.offset;
      add_address(in, operand(1), false);
      if (in.sources != 2 || in.offset != offset) refuse("such addresses");
      in.bytes = static_cast<uint8_t>(std::stoi(operand(2)));
      if (operands() > 3) add_source(in, source(3, Width::k32));
      kernel_.granule[1] = std::min<int>(kernel_.granule[1], in.bytes);
    } else {
      refuse("it is not known");
    }
  }

  void decode_matrices(Instruction& in) {
    const std::vector<std::string> parts = parts_of(name(), '.');  // ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
    if (!begins(name(), "ldmatrix.sync.aligned.m8n8.x") || parts.back() != "b16") refuse("it is not known");
    begin_exchange(in, &load_matrices);
    in.count = static_cast<uint8_t>(parts[4][1] - '0');
    in.mode = parts[5] == "trans";
    for (const std::string& value : parts_of_vector(operand(0))) add_result(in, value, Width::k32);
    add_address(in, operand(1));
    kernel_.granule[1] = std::min(kernel_.granule[1], 2);
  }

  void decode_product(Instruction& in) {
    static const std::map<std::string, Product> kKinds = {
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", Product::kBFloat16},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", Product::kFloat16},
        {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", Product::kTf32},
    };
    const auto kind = kKinds.find(name());
    if (kind == kKinds.end()) refuse("only shapes and types of common/mma.h are");
    begin_exchange(in, &multiply_matrices);
    in.mode = static_cast<uint8_t>(kind->second);
    for (const std::string& value : parts_of_vector(operand(0))) add_result(in, value, Width::k32);
    for (size_t i = 1; i < 4; i++) {
      for (const std::string& value : parts_of_vector(operand(i))) add_source(in, source_of(value, Width::k32));
    }
    if (in.results != 4 || in.sources != 10) refuse("it has another number of registers");
  }

  // atom.global.add.u32 d, [a], b; red is the same without d.
  void decode_atomic(Instruction& in) {
    static const std::map<std::string, Atomic> kOperations = {
        {"add", Atomic::kAdd}, {"min", Atomic::kMin},       {"max", Atomic::kMax}, {"and", Atomic::kAnd},
        {"or", Atomic::kOr},   {"exch", Atomic::kExchange}, {"xor", Atomic::kXor}, {"cas", Atomic::kCompareAndSwap},
    };
    std::vector<std::string> parts = parts_of(name(), '.');
    const auto operation = parts.size() < 3 ? kOperations.end() : kOperations.find(parts[parts.size() - 2]);
    if (operation == kOperations.end()) refuse("it is not known");
    parts.erase(parts.end() - 2);
    std::erase_if(parts, [](const std::string& p) { return p == "relaxed" || p == "gpu" || p == "cta"; });
    decode_access(in, parts);
    const bool is_float = parts.back() == "f32";
    if (in.bytes < 4 || parts.back() == "f64" || (is_float && operation->first != "add")) refuse("of this type");
    in.run = &atomic;
    in.mode = static_cast<uint8_t>(is_float ? Atomic::kAddFloat : operation->second);
    in.value_width = in.bytes == 8 ? Width::k64 : Width::k32;
    const size_t first = name()[0] == 'a' ? 1 : 0;
    if (first == 1) add_result(in, operand(0), in.value_width);
    add_address(in, operand(first));
    in.sources = 1;
    for (size_t i = first + 1; i < operands(); i++) add_source(in, source(i, in.value_width));
  }

  // cvt.u16.u32 and all others between integers, from and to registers that may be wider than the types.
  void decode_integer_conversion(Instruction& in) {
    const std::vector<std::string> parts = parts_of(name(), '.');
    const auto is_integer = [](const std::string& t) { return (t[0] == 'u' || t[0] == 's') && bytes_of_type(t) > 0; };
    const std::optional<Width> to = width_of_register(operand(0)), from = width_of_register(operand(1));
    if (parts.size() != 3 || !is_integer(parts[1]) || !is_integer(parts[2]) || !to || !from) refuse("it is not known");
    in.run = &convert_integer;
    in.count = static_cast<uint8_t>(bytes_of_type(parts[1])), in.bytes = static_cast<uint8_t>(bytes_of_type(parts[2]));
    in.mode = parts[1][0] == 's', in.is_signed = parts[2][0] == 's';
    in.value_width = *to, in.address_width = *from;
    add_result(in, operand(0), *to);
    add_source(in, source(1, *from));
  }

  // mov.b32 %r1, {%rs1, %rs2} and mov.b64 {%r1, %r2}, %rd1
  void decode_pack(Instruction& in) {
    const int whole = bytes_of_type(name().substr(4));
    const bool packs = operand(1)[0] == '{';
    const std::vector<std::string> parts = parts_of_vector(operand(packs ? 1 : 0));
    in.count = static_cast<uint8_t>(parts.size()), in.bytes = static_cast<uint8_t>(whole / in.count);
    if (whole < 4 || (in.bytes != 2 && in.bytes != 4)) refuse("of such parts");
    in.value_width = whole == 8 ? Width::k64 : Width::k32;
    const Width part_width = in.bytes == 2 ? Width::k16 : Width::k32;
    if (packs) {
      in.run = &pack;
      add_result(in, operand(0), in.value_width);
      for (const std::string& part : parts) add_source(in, source_of(part, part_width));
    } else {
      in.run = &unpack;
      for (const std::string& part : parts) add_result(in, part, part_width);
      add_source(in, source(1, in.value_width));
    }
  }

  void finish() {
    if (kernel_.code.empty() || kernel_.code.back().flow != Flow::kReturn) {
      Instruction end;
      end.flow = Flow::kReturn;
      kernel_.code.push_back(end);
    }
    for (const auto& [at, label] : jumps_) kernel_.code[at].target = labels_.at(label);
    allocate_registers(kernel_, widths_);
  }

  Kernel& kernel_;
  const Statement* statement_ = nullptr;
  std::unordered_map<std::string, int> numbers_;  // of registers
  std::vector<Width> widths_;                     // by number
  std::unordered_map<std::string, int> symbols_, labels_;
  std::map<std::pair<uint64_t, Width>, int> constants_;
  std::map<std::string, int> specials_;
  std::vector<std::pair<size_t, std::string>> jumps_;
};

Kernel decode(const Module& module, const std::string& name) {
  Kernel kernel;
  kernel.text = module.read(name);
  kernel.module = &module;
  Decoder(kernel).run();
  return kernel;
}

}  // namespace madkernels::simulator
