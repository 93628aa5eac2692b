#include "inference/checkpoint/json.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "kernels/common/check.h"

namespace moq::checkpoint {
namespace {

bool is_digit(char symbol) {
  return symbol >= '0' && symbol <= '9';
}

/// What stands at a position, for error messages: printable ASCII in quotes, anything else by
/// number.
std::string describe(std::string_view text, std::size_t position) {
  if (position >= text.size()) {
    return "the end of the text";
  }
  const auto symbol = static_cast<unsigned char>(text[position]);
  if (symbol >= 0x20 && symbol < 0x7f) {
    return std::string("'") + static_cast<char>(symbol) + "'";
  }
  std::array<char, 16> number{};
  std::snprintf(number.data(), number.size(), "byte 0x%02x", symbol);
  return number.data();
}

void append_utf8(std::string& out, std::uint32_t code_point) {
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
  } else if (code_point < 0x800) {
    out += static_cast<char>(0xc0 | (code_point >> 6));
    out += static_cast<char>(0x80 | (code_point & 0x3f));
  } else if (code_point < 0x10000) {
    out += static_cast<char>(0xe0 | (code_point >> 12));
    out += static_cast<char>(0x80 | ((code_point >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code_point & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | (code_point >> 18));
    out += static_cast<char>(0x80 | ((code_point >> 12) & 0x3f));
    out += static_cast<char>(0x80 | ((code_point >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code_point & 0x3f));
  }
}

bool is_high_surrogate(std::uint32_t unit) {
  return unit >= 0xd800 && unit < 0xdc00;
}
bool is_low_surrogate(std::uint32_t unit) {
  return unit >= 0xdc00 && unit < 0xe000;
}

}  // namespace

void JsonReader::fail(std::string_view expected) const {
  const std::string_view before = text_.substr(0, std::min(position_, text_.size()));
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const std::size_t line_start = before.rfind('\n') + 1;  // npos + 1 == 0: the first line
  moq::detail::fail(where_, ": line ", line, ", column ", before.size() - line_start + 1,
                    ": expected ", expected, ", got ", describe(text_, position_));
}

void JsonReader::skip_space() {
  while (position_ < text_.size() && (text_[position_] == ' ' || text_[position_] == '\t' ||
                                      text_[position_] == '\n' || text_[position_] == '\r')) {
    ++position_;
  }
}

void JsonReader::expect(char symbol, std::string_view expected) {
  skip_space();
  if (position_ >= text_.size() || text_[position_] != symbol) {
    fail(expected);
  }
  ++position_;
}

JsonReader::Kind JsonReader::peek() {
  skip_space();
  switch (next_char()) {
    case '{':
      return Kind::kObject;
    case '[':
      return Kind::kArray;
    case '"':
      return Kind::kString;
    case 't':
    case 'f':
      return Kind::kBoolean;
    case 'n':
      return Kind::kNull;
    default:
      if (next_char() == '-' || is_digit(next_char())) {
        return Kind::kNumber;
      }
      fail("a value");
  }
}

void JsonReader::read_word(std::string_view word) {
  if (text_.substr(position_, word.size()) != word) {
    fail(word);
  }
  position_ += word.size();
}

void JsonReader::read_null() {
  skip_space();
  read_word("null");
}

bool JsonReader::read_boolean() {
  skip_space();
  const bool value = next_char() == 't';
  read_word(value ? "true" : "false");
  return value;
}

/// number = [ - ] ( 0 | digit1-9 digits ) [ . digits ] [ e [+-] digits ], RFC 8259 section 6.
std::string_view JsonReader::read_number_text() {
  skip_space();
  const std::size_t start = position_;
  const auto read_digits = [this] {
    if (!is_digit(next_char())) {
      fail("a digit");
    }
    while (is_digit(next_char())) {
      ++position_;
    }
  };
  if (next_char() == '-') {
    ++position_;
  }
  if (next_char() == '0') {
    ++position_;
  } else {
    read_digits();
  }
  if (next_char() == '.') {
    ++position_;
    read_digits();
  }
  if (next_char() == 'e' || next_char() == 'E') {
    ++position_;
    if (next_char() == '+' || next_char() == '-') {
      ++position_;
    }
    read_digits();
  }
  return text_.substr(start, position_ - start);
}

bool JsonReader::next_is_integer() {
  skip_space();
  const std::size_t start = position_;
  const std::string_view number = read_number_text();
  position_ = start;
  return number.find_first_of(".eE") == std::string_view::npos;
}

std::int64_t JsonReader::read_integer() {
  skip_space();
  const std::size_t start = position_;
  const std::string_view number = read_number_text();
  std::int64_t value = 0;
  const auto [stop, error] = std::from_chars(number.data(), number.data() + number.size(), value);
  if (error != std::errc{} || stop != number.data() + number.size()) {
    position_ = start;
    fail("an integer of 64 bits");
  }
  return value;
}

std::uint64_t JsonReader::read_unsigned() {
  skip_space();
  const std::size_t start = position_;
  const std::string_view number = read_number_text();
  std::uint64_t value = 0;
  const auto [stop, error] = std::from_chars(number.data(), number.data() + number.size(), value);
  if (error != std::errc{} || stop != number.data() + number.size()) {
    position_ = start;
    fail("an unsigned integer of 64 bits");
  }
  return value;
}

double JsonReader::read_number() {
  skip_space();
  const std::size_t start = position_;
  const std::string_view number = read_number_text();
  double value = 0;
  const auto [stop, error] = std::from_chars(number.data(), number.data() + number.size(), value);
  if (error != std::errc{} || stop != number.data() + number.size() || !std::isfinite(value)) {
    position_ = start;
    fail("a number within the range of a double");
  }
  return value;
}

std::uint32_t JsonReader::read_four_hex_digits() {
  std::uint32_t value = 0;
  const std::string_view digits = text_.substr(position_, 4);
  const auto [stop, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  if (digits.size() != 4 || error != std::errc{} || stop != digits.data() + 4) {
    fail("four hexadecimal digits");
  }
  position_ += 4;
  return value;
}

void JsonReader::read_escape(std::string& out) {
  constexpr std::string_view kNames = "\"\\/bfnrt";
  constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
  const char name = next_char();
  if (const std::size_t index = kNames.find(name); name != '\0' && index != kNames.npos) {
    ++position_;
    out += kValues[index];
    return;
  }
  if (name != 'u') {
    fail("an escape sequence");
  }
  ++position_;
  std::uint32_t code_point = read_four_hex_digits();
  if (is_high_surrogate(code_point)) {
    if (text_.substr(position_, 2) != "\\u") {
      fail("the second half of a surrogate pair");
    }
    position_ += 2;
    const std::uint32_t low = read_four_hex_digits();
    if (!is_low_surrogate(low)) {
      fail("the second half of a surrogate pair before this");
    }
    code_point = 0x10000 + ((code_point - 0xd800) << 10) + (low - 0xdc00);
  } else if (is_low_surrogate(code_point)) {
    fail("the first half of a surrogate pair before this");
  }
  append_utf8(out, code_point);
}

/// One well-formed sequence of two to four bytes (Unicode 15, table 3-7: no overlong forms, no
/// surrogates, nothing above U+10FFFF).
void JsonReader::read_utf8_sequence(std::string& out) {
  const auto byte = [this](std::size_t offset) -> unsigned {
    const std::size_t index = position_ + offset;
    return index < text_.size() ? static_cast<unsigned char>(text_[index]) : 0U;
  };
  const unsigned lead = byte(0);
  unsigned lowest = 0x80;
  unsigned highest = 0xbf;
  std::size_t length = 0;
  if (lead >= 0xc2 && lead <= 0xdf) {
    length = 2;
  } else if (lead >= 0xe0 && lead <= 0xef) {
    length = 3;
    lowest = lead == 0xe0 ? 0xa0 : 0x80;
    highest = lead == 0xed ? 0x9f : 0xbf;
  } else if (lead >= 0xf0 && lead <= 0xf4) {
    length = 4;
    lowest = lead == 0xf0 ? 0x90 : 0x80;
    highest = lead == 0xf4 ? 0x8f : 0xbf;
  } else {
    fail("UTF-8");
  }
  for (std::size_t offset = 1; offset < length; ++offset) {
    if (byte(offset) < lowest || byte(offset) > highest) {
      fail("UTF-8");
    }
    lowest = 0x80;
    highest = 0xbf;
  }
  out.append(text_, position_, length);
  position_ += length;
}

std::string JsonReader::read_string() {
  expect('"', "a string");
  std::string out;
  while (true) {
    if (position_ >= text_.size()) {
      fail("the end of a string");
    }
    const auto symbol = static_cast<unsigned char>(text_[position_]);
    if (symbol == '"') {
      ++position_;
      return out;
    }
    if (symbol == '\\') {
      ++position_;
      read_escape(out);
    } else if (symbol < 0x20) {
      fail("an escape instead of a control character");
    } else if (symbol < 0x80) {
      out += static_cast<char>(symbol);
      ++position_;
    } else {
      read_utf8_sequence(out);
    }
  }
}

void JsonReader::read_array(const std::function<void()>& on_element) {
  expect('[', "an array");
  if (++depth_ > kMaxJsonDepth) {
    fail("at most 64 levels of nesting");
  }
  skip_space();
  if (next_char() == ']') {
    ++position_;
  } else {
    while (true) {
      on_element();
      skip_space();
      if (next_char() == ']') {
        ++position_;
        break;
      }
      expect(',', "',' or ']'");
    }
  }
  --depth_;
}

void JsonReader::read_object(const std::function<void(std::string key)>& on_member) {
  expect('{', "an object");
  if (++depth_ > kMaxJsonDepth) {
    fail("at most 64 levels of nesting");
  }
  skip_space();
  if (next_char() == '}') {
    ++position_;
  } else {
    while (true) {
      std::string key = read_string();
      expect(':', "':'");
      on_member(std::move(key));
      skip_space();
      if (next_char() == '}') {
        ++position_;
        break;
      }
      expect(',', "',' or '}'");
    }
  }
  --depth_;
}

void JsonReader::skip_value() {
  switch (peek()) {
    case Kind::kNull:
      return read_null();
    case Kind::kBoolean:
      static_cast<void>(read_boolean());
      return;
    case Kind::kNumber:
      static_cast<void>(read_number());
      return;
    case Kind::kString:
      static_cast<void>(read_string());
      return;
    case Kind::kArray:
      return read_array([this] { skip_value(); });
    case Kind::kObject:
      return read_object([this](const std::string&) { skip_value(); });
  }
}

void JsonReader::finish() {
  skip_space();
  if (position_ != text_.size()) {
    fail("the end of the text");
  }
}

}  // namespace moq::checkpoint
