#include "inference/checkpoint/json.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "kernels/common/check.h"

namespace moq::checkpoint {
namespace {

/// Sorting views of the keys costs n log n, so that an object of a million members is no attack.
void refuse_repeated_keys(const Json::Object& members, const JsonReader& reader) {
  std::vector<std::string_view> keys;
  keys.reserve(members.size());
  for (const auto& [key, value] : members) {
    keys.push_back(key);
  }
  std::sort(keys.begin(), keys.end());
  const auto repeated = std::adjacent_find(keys.begin(), keys.end());
  if (repeated != keys.end()) {
    reader.fail("every key once before this, but '" + std::string(*repeated) + "' is repeated");
  }
}

Json read_value(JsonReader& reader) {
  switch (reader.peek()) {
    case JsonReader::Kind::kNull:
      reader.read_null();
      return {};
    case JsonReader::Kind::kBoolean:
      return reader.read_boolean();
    case JsonReader::Kind::kNumber:
      return reader.next_is_integer() ? Json(reader.read_integer()) : Json(reader.read_number());
    case JsonReader::Kind::kString:
      return reader.read_string();
    case JsonReader::Kind::kArray: {
      Json::Array elements;
      reader.read_array([&] { elements.push_back(read_value(reader)); });
      return elements;
    }
    case JsonReader::Kind::kObject: {
      Json::Object members;
      reader.read_object(
          [&](std::string key) { members.emplace_back(std::move(key), read_value(reader)); });
      refuse_repeated_keys(members, reader);
      return members;
    }
  }
  reader.fail("a value");
}

const char* kind_of(const Json& value) {
  if (value.is_null()) return "null";
  if (value.is_boolean()) return "a boolean";
  if (value.is_integer()) return "an integer";
  if (value.is_number()) return "a number";
  if (value.is_string()) return "a string";
  return value.is_array() ? "an array" : "an object";
}

void dump_string(std::string& out, std::string_view text) {
  out += '"';
  for (const char symbol : text) {
    const auto byte = static_cast<unsigned char>(symbol);
    if (symbol == '"' || symbol == '\\') {
      out += '\\';
      out += symbol;
    } else if (byte < 0x20) {
      std::array<char, 8> escape{};
      std::snprintf(escape.data(), escape.size(), "\\u%04x", byte);
      out += escape.data();
    } else {
      out += symbol;
    }
  }
  out += '"';
}

void dump_double(std::string& out, double value) {
  MOQ_CHECK(std::isfinite(value), "json: a number must be finite, got ", value);
  std::array<char, 32> text{};
  const auto result = std::to_chars(text.data(), text.data() + text.size(), value);
  const std::string_view number(text.data(), static_cast<std::size_t>(result.ptr - text.data()));
  out += number;
  if (number.find_first_of(".e") == std::string_view::npos) {
    out += ".0";  // reads back as a double, not as an integer
  }
}

void dump_value(std::string& out, const Json& value, int indent, int level) {
  const auto new_line = [&](int at_level) {
    if (indent >= 0) {
      out += '\n';
      out.append(static_cast<std::size_t>(indent) * static_cast<std::size_t>(at_level), ' ');
    }
  };
  const auto dump_list = [&](char open, char close, const auto& list, const auto& dump_entry) {
    out += open;
    bool first = true;
    for (const auto& entry : list) {
      out += first ? "" : indent >= 0 ? "," : ", ";
      first = false;
      new_line(level + 1);
      dump_entry(entry);
    }
    if (!list.empty()) {
      new_line(level);
    }
    out += close;
  };
  if (value.is_null()) {
    out += "null";
  } else if (value.is_boolean()) {
    out += value.as_boolean("json") ? "true" : "false";
  } else if (value.is_integer()) {
    out += std::to_string(value.as_integer("json"));
  } else if (value.is_number()) {
    dump_double(out, value.as_number("json"));
  } else if (value.is_string()) {
    dump_string(out, value.as_string("json"));
  } else if (value.is_array()) {
    dump_list('[', ']', value.as_array("json"),
              [&](const Json& element) { dump_value(out, element, indent, level + 1); });
  } else {
    dump_list('{', '}', value.as_object("json"), [&](const Json::Member& member) {
      dump_string(out, member.first);
      out += ": ";
      dump_value(out, member.second, indent, level + 1);
    });
  }
}

}  // namespace

Json Json::parse(std::string_view text, std::string_view where) {
  JsonReader reader(text, where);
  Json value = read_value(reader);
  reader.finish();
  return value;
}

bool Json::as_boolean(std::string_view where) const {
  MOQ_CHECK(is_boolean(), where, ": expected a boolean, got ", kind_of(*this));
  return std::get<bool>(value_);
}

std::int64_t Json::as_integer(std::string_view where) const {
  MOQ_CHECK(is_integer(), where, ": expected an integer, got ", kind_of(*this));
  return std::get<std::int64_t>(value_);
}

double Json::as_number(std::string_view where) const {
  MOQ_CHECK(is_number(), where, ": expected a number, got ", kind_of(*this));
  return is_integer() ? static_cast<double>(std::get<std::int64_t>(value_))
                      : std::get<double>(value_);
}

const std::string& Json::as_string(std::string_view where) const {
  MOQ_CHECK(is_string(), where, ": expected a string, got ", kind_of(*this));
  return std::get<std::string>(value_);
}

const Json::Array& Json::as_array(std::string_view where) const {
  MOQ_CHECK(is_array(), where, ": expected an array, got ", kind_of(*this));
  return std::get<Array>(value_);
}

const Json::Object& Json::as_object(std::string_view where) const {
  MOQ_CHECK(is_object(), where, ": expected an object, got ", kind_of(*this));
  return std::get<Object>(value_);
}

const Json* Json::find(std::string_view key) const {
  if (!is_object()) {
    return nullptr;
  }
  const Object& members = std::get<Object>(value_);
  const auto member = std::find_if(members.begin(), members.end(),
                                   [&](const Member& candidate) { return candidate.first == key; });
  return member == members.end() ? nullptr : &member->second;
}

const Json& Json::at(std::string_view key, std::string_view where) const {
  as_object(where);
  const Json* value = find(key);
  MOQ_CHECK(value != nullptr, where, ": expected the key '", key, "', which is missing");
  return *value;
}

std::string Json::dump(int indent) const {
  std::string out;
  dump_value(out, *this, indent, 0);
  return out;
}

}  // namespace moq::checkpoint
