// Arrays in NumPy's file format. Whatever cannot be read or written is said in a sentence, as std::runtime_error.
//
//   "\x93NUMPY" major minor | length of the header | {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } | data
//   6 bytes     1     1     | 2, from major 2 on 4 | text, padded with blanks                                    |
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Array {
  std::string descr;  // '<f4': little-endian float32, '<f2': float16, '<i8': int64; its last digit: bytes of an element
  std::vector<int64_t> shape;
  std::vector<char> data;  // C order
};

namespace npy {

inline const char kMagic[] = "\x93NUMPY";
inline constexpr size_t kMagicBytes = 6, kLongestHeader = 1 << 16;

[[noreturn]] inline void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + " " + what);
}

// What stands after 'key': in the header, from its first character to the end of the header.
inline std::string value_of(const std::string& path, const std::string& header, const std::string& key) {
  const size_t at = header.find("'" + key + "':");
  const size_t begin = at == std::string::npos ? at : header.find_first_not_of(' ', at + key.size() + 3);
  if (begin == std::string::npos) fail(path, "has no " + key + " in its header");
  return header.substr(begin);
}

// "(2, 3)", "(2,)" and "()".
inline std::vector<int64_t> shape_of(const std::string& path, const std::string& text) {
  const size_t end = text.find(')');
  if (text[0] != '(' || end == std::string::npos) fail(path, "has no tuple as its shape");
  std::vector<int64_t> shape;
  size_t at = text.find_first_not_of(" ,", 1);
  while (at < end) {
    const size_t stop = text.find_first_not_of("0123456789", at);
    if (stop == at || stop - at > 18) fail(path, "has the shape " + text.substr(0, end + 1));
    shape.push_back(std::stoll(text.substr(at, stop - at)));
    at = text.find_first_not_of(" ,", stop);
  }
  return shape;
}

inline Array read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, "cannot be opened");
  char magic[kMagicBytes + 2];
  if (!file.read(magic, sizeof magic) || std::memcmp(magic, kMagic, kMagicBytes) != 0) fail(path, "is no .npy file");
  const int major = magic[kMagicBytes];
  if (major < 1 || major > 3) fail(path, "is of version " + std::to_string(major) + " of the format; 1 to 3 are known");
  uint32_t length = 0;
  if (!file.read(reinterpret_cast<char*>(&length), major == 1 ? 2 : 4)) fail(path, "ends within its header");
  if (length > kLongestHeader) fail(path, "has a header of " + std::to_string(length) + " bytes");
  std::string header(length, ' ');
  if (!file.read(header.data(), length)) fail(path, "ends within its header");

  Array array;
  const std::string descr = value_of(path, header, "descr");
  array.descr = descr[0] == '\'' ? descr.substr(1, descr.find('\'', 1) - 1) : "a structure";
  if (array.descr != "<f4" && array.descr != "<f2")
    fail(path, "holds elements of type " + array.descr + "; <f4 (float32) or <f2 (float16) is needed");
  if (value_of(path, header, "fortran_order").rfind("False", 0) != 0)
    fail(path, "is in Fortran order; C order is needed");
  array.shape = shape_of(path, value_of(path, header, "shape"));

  int64_t bytes = array.descr.back() - '0';
  for (int64_t size : array.shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) fail(path, "has a shape of more than 2^63 bytes");
  const std::streamoff begin = file.tellg();
  file.seekg(0, std::ios::end);
  const int64_t there = file.tellg() - begin;
  if (there != bytes)
    fail(path, "holds " + std::to_string(there) + " bytes of data; its shape has " + std::to_string(bytes));
  file.seekg(begin);
  array.data.resize(bytes);
  if (!file.read(array.data.data(), bytes)) fail(path, "cannot be read to its end");
  return array;
}

inline void write(const std::string& path, const Array& array) {
  std::string header = "{'descr': '" + array.descr + "', 'fortran_order': False, 'shape': (";
  for (int64_t size : array.shape) header += std::to_string(size) + ", ";
  header += "), }";
  // The data starts at a multiple of 64.
  const size_t before = kMagicBytes + 2 + 2;
  header.resize((before + header.size() + 1 + 63) / 64 * 64 - before, ' ');
  header.back() = '\n';
  const uint16_t length = (uint16_t)header.size();
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic, kMagicBytes).write("\1\0", 2).write(reinterpret_cast<const char*>(&length), 2);
  file.write(header.data(), header.size()).write(array.data.data(), array.data.size());
  if (!file.flush()) fail(path, "cannot be written");
}

}  // namespace npy
