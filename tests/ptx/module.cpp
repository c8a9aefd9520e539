// PTX text -> kernels. An opcode that is not in the tables with its operands is a Fault.
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <set>

#include "machine.h"

namespace ptx {
namespace {

const Opcodes& opcodes() {
  static const Opcodes table = [] {
    Opcodes t;
    add_arithmetic(t);
    add_conversions(t);
    add_memory(t);
    add_warp(t);
    return t;
  }();
  return table;
}

// Registers that the hardware sets.
const std::set<std::string> kSpecials = {"%tid.x",           "%tid.y",    "%tid.z",    "%ctaid.x",  "%ctaid.y",
                                         "%ctaid.z",         "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x",
                                         "%cluster_ctarank", "%envreg1",  "%envreg2"};

std::vector<std::string> words_of(const std::string& text, const char* separators) {
  std::vector<std::string> words;
  std::string word;
  for (char c : text) {
    if (!std::strchr(separators, c)) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(word);
      word.clear();
    }
  }
  if (!word.empty()) words.push_back(word);
  return words;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  std::map<std::string, Kernel> parse() {
    while (next()) module_statement();
    return std::move(kernels_);
  }

 private:
  // The next statement: up to ';', or a label, a brace, or a directive that ends with its line.
  bool next() {
    statement_.clear();
    for (; at_ < text_.size(); at_++) {
      const char c = text_[at_];
      if (text_.compare(at_, 2, "//") == 0) {
        while (at_ < text_.size() && text_[at_] != '\n') at_++;
        at_--;
        continue;
      }
      if (c == '\n') {
        line_++;
        const std::string& s = statement_;
        const bool whole = s.rfind(".version", 0) == 0 || s.rfind(".target", 0) == 0 || s.rfind(".maxntid", 0) == 0 ||
                           s.rfind(".address_size", 0) == 0 || s.rfind(".minnctapersm", 0) == 0;
        if (whole) return at_++, true;
      }
      if (std::isspace((unsigned char)c)) {
        if (!statement_.empty() && statement_.back() != ' ') statement_ += ' ';
        continue;
      }
      if (c == ';') return at_++, true;
      statement_ += c;
      const bool opens = c == '{' && (statement_.size() == 1 || statement_.compare(0, 8, ".visible") == 0);
      if (opens || (c == '}' && statement_.size() == 1)) return at_++, true;
      if (c == ':' && statement_[0] == '$') return at_++, true;
    }
    while (!statement_.empty() && statement_.back() == ' ') statement_.pop_back();
    return !statement_.empty();
  }

  [[noreturn]] void unknown(const char* what) { fault("line %d of the PTX: %s: %s", line_, what, statement_.c_str()); }

  void module_statement() {
    const auto words = words_of(statement_, " \t");
    if (words.empty()) return;
    if (words[0] == ".version" || words[0] == ".target" || words[0] == ".address_size") return;
    if (words[0] == ".extern" && words[1] == ".shared") {
      std::string symbol = words.back();
      shared_symbol_ = symbol.substr(0, symbol.find('['));
      return;
    }
    if (words[0] != ".visible" || words[1] != ".entry") unknown("not a kernel");
    kernel_ = {};
    kernel_.name = words[2].substr(0, words[2].find('('));
    const size_t bracket = statement_.find('[');
    parameter_symbol_ = kernel_.name + "_param_0";
    if (bracket == std::string::npos || statement_.find(parameter_symbol_) == std::string::npos)
      unknown("a kernel with other than one parameter");
    kernel_.parameter_bytes = std::strtoul(statement_.c_str() + bracket + 1, nullptr, 10);
    const size_t bound = statement_.find(".maxntid");
    if (bound == std::string::npos) unknown("no .maxntid");
    kernel_.threads = (unsigned)std::strtoul(statement_.c_str() + bound + 8, nullptr, 10);
    body();
  }

  void body() {
    registers_.clear();
    constants_.clear();
    labels_.clear();
    jumps_.clear();
    for (int depth = 1; depth;) {
      if (!next()) unknown("the text ends in a kernel");
      if (statement_ == "{") depth++;
      else if (statement_ == "}") depth--;
      else if (statement_.back() == ':')
        labels_[statement_.substr(0, statement_.size() - 1)] = (int)kernel_.code.size();
      else if (statement_.rfind(".reg", 0) == 0) declare();
      else if (statement_.rfind(".pragma", 0) == 0) continue;  // hints to the assembler
      else if (!statement_.empty() && statement_ != " ") instruction();
    }
    for (const auto& [index, label] : jumps_) {
      if (!labels_.count(label)) fault("no label %s in %s", label.c_str(), kernel_.name.c_str());
      kernel_.code[index].target = labels_[label];
    }
    kernels_[kernel_.name] = std::move(kernel_);
  }

  Operand reserve(int width) {
    if (kernel_.registers == 0xffff) unknown("too many registers");
    const Operand operand = {kernel_.file_bytes, kernel_.registers++, (uint8_t)width};
    kernel_.file_bytes += width ? width * kLanes : 4;
    kernel_.file_bytes = (kernel_.file_bytes + 7) / 8 * 8;
    return operand;
  }

  void declare() {  // .reg .b32 %r<12> or .reg .b64 %tmp
    const auto words = words_of(statement_, " \t");
    static const std::map<std::string, int> widths = {{".pred", 0}, {".b16", 2}, {".b32", 4},
                                                      {".f32", 4},  {".b64", 8}, {".f64", 8}};
    if (words.size() != 3 || !widths.count(words[1])) unknown("a declaration");
    const int width = widths.at(words[1]);
    const size_t open = words[2].find('<');
    if (open == std::string::npos) {
      registers_[words[2]] = reserve(width);
      return;
    }
    const int count = std::atoi(words[2].c_str() + open + 1);
    for (int i = 0; i < count; i++) registers_[words[2].substr(0, open) + std::to_string(i)] = reserve(width);
  }

  void instruction() {
    Instruction in;
    in.line = line_;
    in.text = statement_;
    std::string rest = statement_;
    if (rest[0] == '@') {
      in.unless = rest[1] == '!';
      const size_t end = rest.find(' ');
      const std::string name = rest.substr(in.unless ? 2 : 1, end - (in.unless ? 2 : 1));
      if (!registers_.count(name)) unknown("an unknown guard");
      in.guard = registers_.at(name);
      rest = rest.substr(rest.find_first_not_of(' ', end));
    }
    const std::string opcode = rest.substr(0, rest.find_first_of(" \t"));
    rest = rest.size() > opcode.size() ? rest.substr(opcode.size()) : "";
    const auto operands = words_of(rest, " \t,{}|");
    const auto [from, to] = opcodes().equal_range(opcode);
    if (from == to) unknown("an opcode that is not in the tables");
    for (auto candidate = from; candidate != to; ++candidate)
      if (bind(candidate->second, operands, in)) {
        kernel_.code.push_back(std::move(in));
        return;
      }
    unknown("operands that do not fit the opcode");
  }

  bool bind(const Opcode& opcode, const std::vector<std::string>& operands, Instruction& in) {
    in.execute = opcode.execute;
    in.flow = opcode.flow;
    in.undefined = opcode.undefined;
    in.members = (int8_t)opcode.members;
    in.count = 0;
    size_t taken = 0;
    for (const char* s = opcode.signature.c_str(); *s; s++) {
      if (*s == '=') {
        in.outputs = in.count;
        continue;
      }
      if (taken == operands.size()) return false;
      const std::string& word = operands[taken++];
      if (*s == 'L') {
        jumps_.emplace_back(kernel_.code.size(), word);
        continue;
      }
      const bool wider = *s == '>';
      if (wider) s++;
      Operand& operand = in.operands[in.count++];
      if (*s == 'a' || *s == 'A') {
        if (word.front() != '[' || word.back() != ']') return false;
        if (!address(word.substr(1, word.size() - 2), *s == 'a' ? 8 : 4, operand)) return false;
      } else if (!value(word, *s == 'p' ? 0 : *s - '0', wider, operand)) {
        return false;
      }
    }
    return taken == operands.size();
  }

  // register, register+displacement, symbol, symbol+displacement
  bool address(const std::string& word, int width, Operand& operand) {
    const size_t plus = word.find('+');
    const std::string name = word.substr(0, plus);
    if (!value(name, width, false, operand)) return false;
    operand.displacement = plus == std::string::npos ? 0 : (int32_t)std::strtol(word.c_str() + plus + 1, nullptr, 10);
    return true;
  }

  bool value(const std::string& word, int width, bool wider, Operand& operand) {
    if (kSpecials.count(word)) {
      if (width != 4) return false;
      if (!kernel_.specials.count(word)) kernel_.specials[word] = reserve(4);
      operand = kernel_.specials.at(word);
      return true;
    }
    if (word[0] == '%') {
      if (!registers_.count(word)) unknown("an unknown register");
      operand = registers_.at(word);
      return wider ? operand.width >= width && operand.width : operand.width == width;
    }
    uint64_t bits;
    if (word == parameter_symbol_) {
      bits = kParameterBase;
    } else if (word == shared_symbol_) {
      bits = kSharedBase;
    } else if (word.compare(0, 2, "0f") == 0 && width == 4) {
      bits = std::strtoull(word.c_str() + 2, nullptr, 16);
    } else if (word.compare(0, 2, "0d") == 0 && width == 8) {
      bits = std::strtoull(word.c_str() + 2, nullptr, 16);
    } else {
      char* end;
      bits = word[0] == '-' ? (uint64_t)std::strtoll(word.c_str(), &end, 0) : std::strtoull(word.c_str(), &end, 0);
      if (*end) return false;
    }
    const auto [entry, fresh] = constants_.try_emplace({width, bits});
    if (fresh) {
      entry->second = reserve(width);
      kernel_.constants.push_back({entry->second, bits});
    }
    operand = entry->second;
    return true;
  }

  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
  std::string statement_, shared_symbol_, parameter_symbol_;
  Kernel kernel_;
  std::map<std::string, Kernel> kernels_;
  std::map<std::string, Operand> registers_;
  std::map<std::pair<int, uint64_t>, Operand> constants_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
};

}  // namespace

std::map<std::string, Kernel> parse(const std::string& text) { return Parser(text).parse(); }

}  // namespace ptx
