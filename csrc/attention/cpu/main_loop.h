// The attention of one block of query rows, for every instruction set: FlashAttention's loop over
// key tiles with an online softmax in base 2 (algorithm.md 2.4).
//
// A kernel_*.cpp gives a struct Isa: its vector types and one function per instruction used here.
// Both products run on "words" of 32 bits: a dot step multiplies kDepth channels packed in a word,
// a value step kPair keys packed in a word. Tiles of K and V are packed so that one vector holds
// the same word of kLanes keys, or of kLanes output channels.
//
// Source: FlashAttention-2 (arXiv 2307.08691), SageAttention (arXiv 2410.02367).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "attention/cpu/formats.h"
#include "attention/cpu/kernel.h"

namespace torch_sage {
namespace {

// Keys of one tile. K and V of a tile at head_dim 128 take 32 + 64 KiB of the 1 MiB L2, the scores
// of the rows in work 6 KiB of the 32 KiB L1.
constexpr int64_t kBlockKeys = 256;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Keys that query row `row` can see: the first ones, up to the causal diagonal.
inline int64_t visible_keys(const CpuAttentionParams& p, int64_t row) {
  if (p.causal == Causal::kNone) return p.seqlen_k;
  const int64_t offset = p.causal == Causal::kBottomRight ? p.seqlen_k - p.seqlen_q : 0;
  const int64_t visible = row + offset + 1;
  return visible < 0 ? 0 : (visible < p.seqlen_k ? visible : p.seqlen_k);
}

// Calls f.template operator()<n>() for the n in 1..kMax that equals `n`.
template <int kMax, class F>
inline void with_constant(int64_t n, const F& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (void)((n == kIndex + 1 && (f.template operator()<kIndex + 1>(), true)) || ...);
  }(std::make_integer_sequence<int, kMax>());
}

template <class Isa>
class BlockAttention {
  using Float = typename Isa::Float;
  static constexpr int64_t kLanes = Isa::kLanes;
  static constexpr int kRows = Isa::kRows;  // register block of both products: kRows vectors down,
  static constexpr int kCols = Isa::kCols;  // kCols vectors across
  static constexpr int64_t kColumns = kCols * kLanes;
  static constexpr int64_t kRowLanes = round_up(kRows, kLanes);
  static constexpr int64_t kScratchRows = round_up(kMaxBlockRows, kLanes);
  static_assert(kMaxBlockRows % kRows == 0 && kBlockKeys % kColumns == 0);

 public:
  static int64_t scratch_bytes(const CpuAttentionParams& p) {
    return BlockAttention(p, nullptr).bytes_;
  }

  static void attend(const CpuAttentionParams& p, const QueryBlock& block, void* scratch) {
    BlockAttention(p, scratch).run(block);
  }

 private:
  BlockAttention(const CpuAttentionParams& p, void* scratch)
      : p_(p),
        steps_(p.row_bytes / Isa::kDepth),
        channels_(round_up(p.head_dim_v, kLanes)),
        scratch_(static_cast<std::byte*>(scratch)) {
    take(query_, kScratchRows * steps_);
    take(query_start_, kScratchRows);
    take(query_factor_, kScratchRows);
    take(row_max_, kScratchRows);
    take(row_sum_, kScratchRows);
    take(row_sum_exact_, kScratchRows);
    take(output_, kScratchRows * channels_);
    take(keys_, kBlockKeys * steps_);
    take(key_rows_, kLanes * round_up(steps_, kLanes));
    take(key_scales_, kBlockKeys);
    take(score_bias_, kBlockKeys);
    take(values_, kBlockKeys / Isa::kPair * channels_);
    take(bias_, kBlockKeys);
    take(scores_, kRows * kBlockKeys);
    take(probabilities_, kRows * kBlockKeys / Isa::kPair);
  }

  template <class T>
  void take(T*& pointer, int64_t count) {
    if (scratch_ != nullptr) pointer = reinterpret_cast<T*>(scratch_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

  void run(const QueryBlock& block) {
    block_ = block;
    kv_head_ = block.batch * p_.heads_kv + block.head / (p_.heads_q / p_.heads_kv);
    prepare_rows();
    const int64_t keys = visible_keys(p_, block.first_row + block.rows - 1);
    for (first_key_ = 0; first_key_ < keys; first_key_ += kBlockKeys) {
      const int64_t left = keys - first_key_;
      attend_tile(left < kBlockKeys ? left : kBlockKeys);
    }
    for (int64_t row = 0; row < block.rows; ++row) finish_row(row);
  }

  void prepare_rows() {
    const int64_t first =
        (block_.batch * p_.heads_q + block_.head) * p_.seqlen_q + block_.first_row;
    const float base2_scale = p_.scale * kLog2E;
    for (int64_t row = 0; row < kScratchRows; ++row) {
      row_max_[row] = -kInfinity;
      row_sum_[row] = row_sum_exact_[row] = 0.0f;
    }
    for (int64_t row = 0; row < block_.rows; ++row) {
      const int8_t* codes = p_.query_codes + (first + row) * p_.row_bytes;
      Isa::encode_query(codes, p_.row_bytes, query_ + row * steps_);
      int32_t sum = 0;
      for (int64_t d = 0; d < p_.row_bytes; ++d) sum += codes[d];
      query_start_[row] = -Isa::kKeyOffset * sum;
      query_factor_[row] = p_.query_scales[first + row] * base2_scale;
    }
    std::memset(output_, 0, block_.rows * channels_ * sizeof(float));
  }

  void attend_tile(int64_t keys) {
    pack_keys(keys);
    pack_values(keys);
    const bool one_bias = p_.mask_kind != MaskKind::kNone && p_.mask_stride_n == 0;
    if (one_bias) load_bias(p_, block_.batch, block_.head, 0, first_key_, keys, bias_);
    for (int64_t row = 0; row < block_.rows; row += kRows) {
      const int64_t rows = block_.rows - row < kRows ? block_.rows - row : kRows;
      const int64_t last = block_.first_row + row + rows - 1;
      const int64_t visible = visible_keys(p_, last) - first_key_;
      if (visible <= 0) continue;
      with_constant<kRows>(
          rows, [&]<int kCount>() { attend_rows<kCount>(row, visible < keys ? visible : keys); });
    }
  }

  // Keys are zero-padded to whole vectors.
  void pack_keys(int64_t keys) {
    const int64_t first = kv_head_ * p_.seqlen_k + first_key_;
    const int8_t* codes = p_.key_codes + first * p_.row_bytes;
    const int64_t padded = round_up(keys, kLanes);
    const int64_t row_words = round_up(steps_, kLanes);
    for (int64_t key = 0; key < padded; key += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        uint32_t* words = key_rows_ + lane * row_words;
        if (key + lane < keys) {
          Isa::encode_key(codes + (key + lane) * p_.row_bytes, p_.row_bytes, words);
        } else {
          std::memset(words, 0, steps_ * sizeof(uint32_t));
        }
      }
      uint32_t* packed = keys_ + key / kColumns * kColumns * steps_ + key % kColumns;
      for (int64_t step = 0; step < steps_; step += kLanes) {
        const int64_t left = steps_ - step;
        Isa::transpose(key_rows_ + step, row_words, packed + step * kColumns, kColumns,
                       left < kLanes ? left : kLanes);
      }
    }
    std::memcpy(key_scales_, p_.key_scales + first, keys * sizeof(float));
    for (int64_t key = keys; key < padded; ++key) key_scales_[key] = 0.0f;
    const int64_t head = block_.batch * p_.heads_q + block_.head;
    for (int64_t key = 0; key < padded; ++key) {
      const bool is_biased = p_.score_bias != nullptr && key < keys;
      score_bias_[key] = is_biased ? p_.score_bias[head * p_.seqlen_k + first_key_ + key] : 0.0f;
    }
  }

  // Channels are zero-padded to whole vectors, keys to whole words.
  void pack_values(int64_t keys) {
    const uint16_t* value = p_.value + (kv_head_ * p_.seqlen_k + first_key_) * p_.head_dim_v;
    for (int64_t key = 0; key < keys; key += Isa::kPair) {
      uint32_t* words = values_ + key / Isa::kPair * channels_;
      const uint16_t* row = value + key * p_.head_dim_v;
      for (int64_t d = 0; d < p_.head_dim_v; ++d) {
        if constexpr (Isa::kPair == 1) {
          words[d] = uint32_t{row[d]} << 16;
        } else if (key + 1 < keys) {
          words[d] = row[d] | uint32_t{row[p_.head_dim_v + d]} << 16;
        } else {
          words[d] = row[d];
        }
      }
      for (int64_t d = p_.head_dim_v; d < channels_; ++d) words[d] = 0;
    }
  }

  // kCount rows from `row` on against the first `keys` keys of the tile.
  template <int kCount>
  void attend_rows(int64_t row, int64_t keys) {
    const int64_t padded = round_up(keys, kLanes);
    for (int64_t key = 0; key < padded; key += kColumns) {
      const int64_t vectors = (padded - key) / kLanes;
      with_constant<kCols>(vectors < kCols ? vectors : kCols,
                           [&]<int kVectors>() { score<kCount, kVectors>(row, key); });
    }
    for (int r = 0; r < kCount; ++r) hide_keys(row + r, scores_ + r * kBlockKeys, keys, padded);
    alignas(64) float rescale[kRowLanes] = {};
    update_softmax<kCount>(row, padded, rescale);
    const int64_t words = (keys + Isa::kPair - 1) / Isa::kPair;
    for (int64_t channel = 0; channel < channels_; channel += kColumns) {
      const int64_t vectors = (channels_ - channel) / kLanes;
      with_constant<kCols>(vectors < kCols ? vectors : kCols, [&]<int kVectors>() {
        add_values<kCount, kVectors>(row, channel, words, rescale);
      });
    }
  }

  // Base-2 logits of kCount rows against kVectors vectors of keys, exact up to the last product.
  template <int kCount, int kVectors>
  void score(int64_t row, int64_t key) {
    typename Isa::Acc acc[kCount][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) acc[r][c] = Isa::start(query_start_[row + r]);
    }
    const uint32_t* keys = keys_ + key * steps_;
    const uint32_t* query = query_ + row * steps_;
    for (int64_t step = 0; step < steps_; ++step, keys += kColumns) {
      typename Isa::Words key_words[kVectors];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) key_words[c] = Isa::load_words(keys + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const auto query_word = Isa::splat_word(query + r * steps_ + step);
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) {
          acc[r][c] = Isa::dot(acc[r][c], key_words[c], query_word);
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      const Float key_scale = Isa::load(key_scales_ + key + c * kLanes);
      const Float bias = Isa::load(score_bias_ + key + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const Float factor = Isa::mul(Isa::splat(query_factor_[row + r]), key_scale);
        Isa::store(scores_ + r * kBlockKeys + key + c * kLanes,
                   Isa::add(Isa::mul(Isa::to_float(acc[r][c]), factor), bias));
      }
    }
  }

  // Adds the mask, and selects -infinity for what it, the diagonal or the end of K hides.
  void hide_keys(int64_t row, float* scores, int64_t keys, int64_t padded) {
    const int64_t query_row = block_.first_row + row;
    const int64_t visible = visible_keys(p_, query_row) - first_key_;
    const int64_t end = visible < 0 ? 0 : (visible < keys ? visible : keys);
    if (p_.mask_kind != MaskKind::kNone) {
      if (p_.mask_stride_n != 0) {
        load_bias(p_, block_.batch, block_.head, query_row, first_key_, end, bias_);
      }
      for (int64_t key = 0; key < end; ++key) {
        const float biased = scores[key] + bias_[key];
        scores[key] = bias_[key] == -kInfinity ? -kInfinity : biased;
      }
    }
    for (int64_t key = end; key < padded; ++key) scores[key] = -kInfinity;
  }

  // Scores become probabilities; `rescale` is what the rows' earlier output has to be multiplied
  // by.
  template <int kCount>
  void update_softmax(int64_t row, int64_t padded, float* rescale) {
    alignas(64) float shift[kRowLanes] = {};
    for (int r = 0; r < kCount; ++r) {
      const float* scores = scores_ + r * kBlockKeys;
      // A NaN score may be lost from the maximum: it still makes a NaN probability below.
      Float largest = Isa::splat(row_max_[row + r]);
      for (int64_t key = 0; key < padded; key += kLanes) {
        largest = Isa::max(Isa::load(scores + key), largest);
      }
      const float row_max = Isa::max_lanes(largest);
      shift[r] = row_max == -kInfinity ? 0.0f : row_max;  // a row that has seen no key yet
      rescale[r] = row_max_[row + r] - shift[r];
      row_max_[row + r] = row_max;
    }
    for (int64_t r = 0; r < kRowLanes; r += kLanes) {
      Isa::store(rescale + r, Isa::exp2(Isa::load(rescale + r)));
    }
    for (int r = 0; r < kCount; ++r) {
      const float* scores = scores_ + r * kBlockKeys;
      uint32_t* words = probabilities_ + r * (kBlockKeys / Isa::kPair);
      const Float row_shift = Isa::splat(shift[r]);
      Float exact = Isa::splat(0.0f);
      typename Isa::Sum rounded = Isa::zero_sum();
      for (int64_t key = 0; key < padded; key += kLanes) {
        const Float p = Isa::exp2(Isa::sub(Isa::load(scores + key), row_shift));
        exact = Isa::add(exact, p);
        rounded = Isa::store_rounded(words + key / Isa::kPair, p, rounded);
      }
      row_sum_[row + r] = row_sum_[row + r] * rescale[r] + Isa::sum_lanes(rounded);
      row_sum_exact_[row + r] = row_sum_exact_[row + r] * rescale[r] + Isa::sum_lanes(exact);
    }
  }

  template <int kCount, int kVectors>
  void add_values(int64_t row, int64_t channel, int64_t words, const float* rescale) {
    float* output = output_ + row * channels_ + channel;
    Float acc[kCount][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        acc[r][c] =
            Isa::mul(Isa::load(output + r * channels_ + c * kLanes), Isa::splat(rescale[r]));
      }
    }
    const uint32_t* values = values_ + channel;
    const uint32_t* probabilities = probabilities_;
    for (int64_t word = 0; word < words; ++word, values += channels_) {
      typename Isa::Words value_words[kVectors];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) value_words[c] = Isa::load_words(values + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const auto probability =
            Isa::splat_word(probabilities + r * (kBlockKeys / Isa::kPair) + word);
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) {
          acc[r][c] = Isa::accumulate(acc[r][c], value_words[c], probability);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        Isa::store(output + r * channels_ + c * kLanes, acc[r][c]);
      }
    }
  }

  // o = (O / d) * value_scale + value_mean, or 0 for a row that attends to nothing (E11).
  void finish_row(int64_t row) {
    const int64_t query_row = block_.first_row + row;
    float* output = output_ + row * channels_;
    const bool attends = row_sum_[row] != 0.0f;
    if (attends) {
      const float inverse = 1.0f / row_sum_[row];
      const float* scale = p_.value_scales + kv_head_ * p_.head_dim_v;
      const float* mean = p_.value_mean + kv_head_ * p_.head_dim_v;
      for (int64_t d = 0; d < p_.head_dim_v; ++d) {
        output[d] = output[d] * inverse * scale[d] + mean[d];
      }
    } else {
      std::memset(output, 0, p_.head_dim_v * sizeof(float));
    }
    store_row(p_,
              block_.batch * p_.output_stride_b + block_.head * p_.output_stride_h +
                  query_row * p_.output_stride_n,
              output);
    if (p_.lse == nullptr) return;
    const int64_t index = (block_.batch * p_.heads_q + block_.head) * p_.seqlen_q + query_row;
    // From the sum of unrounded probabilities: rounding must not add to the lse (algorithm.md 2.8).
    const float lse = kLn2 * (row_max_[row] + std::log2(row_sum_exact_[row]));
    const float shift = p_.lse_shift == nullptr ? 0.0f : p_.lse_shift[index];
    p_.lse[index] = attends ? lse + shift : -kInfinity;
  }

  const CpuAttentionParams& p_;
  QueryBlock block_{};
  int64_t kv_head_ = 0;     // batch * heads_kv + head
  int64_t first_key_ = 0;   // of the tile in work
  const int64_t steps_;     // words of a query or key row
  const int64_t channels_;  // head_dim_v, padded to whole vectors

  std::byte* const scratch_;
  int64_t bytes_ = 0;
  uint32_t* query_ = nullptr;          // [row, step]
  int32_t* query_start_ = nullptr;     // [row] what a dot product starts from
  float* query_factor_ = nullptr;      // [row] query scale * softmax scale * log2(e)
  float* row_max_ = nullptr;           // [row] of the base-2 logits seen so far
  float* row_sum_ = nullptr;           // [row] of rounded probabilities: weights sum to 1
  float* row_sum_exact_ = nullptr;     // [row] of unrounded ones, for the lse
  float* output_ = nullptr;            // [row, channel] not yet divided by the sum
  uint32_t* keys_ = nullptr;           // [key / kColumns, step, kColumns]
  uint32_t* key_rows_ = nullptr;       // [lane, step] before the transposition
  float* key_scales_ = nullptr;        // [key]
  float* score_bias_ = nullptr;        // [key] of the base-2 scores
  uint32_t* values_ = nullptr;         // [key / kPair, channel]
  float* bias_ = nullptr;              // [key]
  float* scores_ = nullptr;            // [kRows, key]
  uint32_t* probabilities_ = nullptr;  // [kRows, key / kPair]
};

template <class Isa>
constexpr CpuKernel kernel_of() {
  return {&BlockAttention<Isa>::scratch_bytes, &BlockAttention<Isa>::attend};
}

}  // namespace
}  // namespace torch_sage
