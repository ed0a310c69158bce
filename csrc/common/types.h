// The strings of the ops become enums here, once; an error lists the valid values.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "common/check.h"
#include "common/params.h"

namespace torch_sage {

enum class QkFormat { kInt8 };
enum class PvFormat { kBf16 };
enum class Granularity { kToken, kThread, kWarp, kBlock, kTensor };
enum class Exponential { kExact };
enum class OutputOrder { kBhsd, kBshd };

struct Smooth {
  bool query;
  bool key;
  bool value;
};

template <typename Enum, size_t N>
using Names = std::array<std::pair<std::string_view, Enum>, N>;

inline constexpr Names<QkFormat, 1> kQkFormats = {{{"int8", QkFormat::kInt8}}};
inline constexpr Names<PvFormat, 1> kPvFormats = {{{"bf16", PvFormat::kBf16}}};
inline constexpr Names<Granularity, 5> kGranularities = {{{"token", Granularity::kToken},
                                                          {"thread", Granularity::kThread},
                                                          {"warp", Granularity::kWarp},
                                                          {"block", Granularity::kBlock},
                                                          {"tensor", Granularity::kTensor}}};
inline constexpr Names<Smooth, 8> kSmoothing = {{{"", {false, false, false}},
                                                 {"k", {false, true, false}},
                                                 {"v", {false, false, true}},
                                                 {"kv", {false, true, true}},
                                                 {"q", {true, false, false}},
                                                 {"qk", {true, true, false}},
                                                 {"qv", {true, false, true}},
                                                 {"qkv", {true, true, true}}}};
inline constexpr Names<Exponential, 1> kExponentials = {{{"exact", Exponential::kExact}}};
inline constexpr Names<Causal, 3> kCausal = {{{"none", Causal::kNone},
                                              {"top_left", Causal::kTopLeft},
                                              {"bottom_right", Causal::kBottomRight}}};
inline constexpr Names<OutputOrder, 2> kOutputOrders = {
    {{"bhsd", OutputOrder::kBhsd}, {"bshd", OutputOrder::kBshd}}};

template <typename Enum, size_t N>
Enum parse(const char* argument, std::string_view value, const Names<Enum, N>& names,
           const char* device = "cpu") {
  for (const auto& [name, enumerator] : names) {
    if (value == name) return enumerator;
  }
  std::string valid;
  for (const auto& [name, enumerator] : names) {
    valid += std::string(valid.empty() ? "" : ", ") + "'" + std::string(name) + "'";
  }
  fail(argument, " must be one of [", valid, "] on ", device, ", got '", value, "'");
}

}  // namespace torch_sage
