#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

/// A strict JSON reader for files that nobody vouches for, and a small document type on top of it.
///
/// Exactly RFC 8259 in UTF-8, and stricter where the RFC leaves a choice: no duplicate keys, no
/// byte order mark, no unpaired surrogates, no number that its type cannot hold, nothing after the
/// value but white space. Memory grows with the text that was really read, never with a number
/// written in it.
namespace moq::checkpoint {

/// Nesting that the reader accepts. Every format read here needs fewer than ten levels; the limit
/// keeps a text of a million brackets from exhausting the stack.
constexpr int kMaxJsonDepth = 64;

/// Pulls one JSON text apart, value by value, in file order.
///
///   JsonReader reader(text, "config.json");
///   reader.read_object([&](std::string key) { sizes[std::move(key)] = reader.read_integer(); });
///   reader.finish();
///
/// Every function throws moq::Error that names `where`, the line and column, what was expected and
/// what was found.
class JsonReader {
 public:
  enum class Kind : std::uint8_t { kNull, kBoolean, kNumber, kString, kArray, kObject };

  /// @param text   must outlive the reader
  /// @param where  names the source in errors: a file name
  JsonReader(std::string_view text, std::string_view where) : text_(text), where_(where) {}

  /// Kind of the next value, which stays unread.
  Kind peek();

  void read_null();
  bool read_boolean();
  /// A number without fraction and exponent that fits std::int64_t.
  std::int64_t read_integer();
  /// A number without sign, fraction and exponent that fits std::uint64_t.
  std::uint64_t read_unsigned();
  /// Any number that a double can hold without overflow.
  double read_number();
  /// True if the next number is written without fraction and exponent.
  bool next_is_integer();
  std::string read_string();
  /// Any value, checked and forgotten.
  void skip_value();

  /// Calls on_element() once an element; it must read exactly one value.
  void read_array(const std::function<void()>& on_element);
  /// Calls on_member(key) once a member; it must read exactly one value. Keys are unescaped; the
  /// caller decides how to store them and whether the same key came before.
  void read_object(const std::function<void(std::string key)>& on_member);

  /// Checks that nothing but white space follows.
  void finish();

  /// Throws moq::Error at the current position: "where: line l, column c: <expected>, got <found>".
  [[noreturn]] void fail(std::string_view expected) const;

 private:
  void skip_space();
  char next_char() const { return position_ < text_.size() ? text_[position_] : '\0'; }
  void expect(char symbol, std::string_view expected);
  void read_word(std::string_view word);
  std::string_view read_number_text();
  void read_escape(std::string& out);
  std::uint32_t read_four_hex_digits();
  void read_utf8_sequence(std::string& out);

  std::string_view text_;
  std::string_view where_;
  std::size_t position_ = 0;
  int depth_ = 0;
};

/// A JSON document in memory.
class Json {
 public:
  using Array = std::vector<Json>;
  using Member = std::pair<std::string, Json>;
  using Object = std::vector<Member>;  ///< in file order, keys unique

  Json() = default;
  Json(std::nullptr_t) {}                                  // NOLINT(google-explicit-constructor)
  Json(bool value) : value_(value) {}                      // NOLINT(google-explicit-constructor)
  Json(std::int64_t value) : value_(value) {}              // NOLINT(google-explicit-constructor)
  Json(int value) : value_(std::int64_t{value}) {}         // NOLINT(google-explicit-constructor)
  Json(double value) : value_(value) {}                    // NOLINT(google-explicit-constructor)
  Json(std::string value) : value_(std::move(value)) {}    // NOLINT(google-explicit-constructor)
  Json(const char* value) : value_(std::string(value)) {}  // NOLINT(google-explicit-constructor)
  Json(Array value) : value_(std::move(value)) {}          // NOLINT(google-explicit-constructor)
  Json(Object value) : value_(std::move(value)) {}         // NOLINT(google-explicit-constructor)

  /// The document in `text`.
  /// @param where  names the source in errors: a file name
  /// @throws moq::Error if the text is not strict JSON, nests deeper than kMaxJsonDepth or repeats
  /// a key
  static Json parse(std::string_view text, std::string_view where);

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  bool is_boolean() const { return std::holds_alternative<bool>(value_); }
  bool is_integer() const { return std::holds_alternative<std::int64_t>(value_); }
  /// True for integers too.
  bool is_number() const { return is_integer() || std::holds_alternative<double>(value_); }
  bool is_string() const { return std::holds_alternative<std::string>(value_); }
  bool is_array() const { return std::holds_alternative<Array>(value_); }
  bool is_object() const { return std::holds_alternative<Object>(value_); }

  /// Value of that type.
  /// @param where  names the value in errors: "config.json: hidden_size"
  /// @throws moq::Error "<where>: expected an integer, got a string"
  bool as_boolean(std::string_view where) const;
  std::int64_t as_integer(std::string_view where) const;
  double as_number(std::string_view where) const;
  const std::string& as_string(std::string_view where) const;
  const Array& as_array(std::string_view where) const;
  const Object& as_object(std::string_view where) const;

  /// Member of an object; null if this is not an object or has no such member.
  const Json* find(std::string_view key) const;
  /// Member of an object.
  /// @throws moq::Error naming `where` and the key if it is missing
  const Json& at(std::string_view key, std::string_view where) const;

  /// The document as text. Numbers read back to the same value; strings are UTF-8, control
  /// characters escaped.
  /// @param indent  spaces a level; negative: everything on one line
  std::string dump(int indent = -1) const;

 private:
  std::variant<std::monostate, bool, std::int64_t, double, std::string, Array, Object> value_;
};

}  // namespace moq::checkpoint
