// Attention of new tokens over caches against loops in double precision, and that what is beside a row changes no bit.
#include "luthier/attention_decode.hpp"

#include "oracle.hpp"

namespace {

struct Shape {
  std::vector<int64_t> rows, held, prefix;  // of each cache
  int64_t new_tokens, heads, key_heads, size, rotary;
  float softcap;
};

template <class Scalar>
struct Cache {
  std::vector<Scalar> key, value, prefix_key, prefix_value;
  int64_t rows, capacity, held, num_new, prefix, key_heads, size;
  luthier::CachedRows problem() {
    return {key.data(), value.data(), prefix_key.data(), prefix_value.data(), rows, capacity, held, num_new, prefix,
            key_heads,  size,         dtype_of<Scalar>()};
  }
};

template <class Scalar>
struct Inputs {
  std::vector<Cache<Scalar>> caches;
  std::vector<int64_t> first;
  std::vector<int64_t> token;  // the first one of each row, and how many there are
  std::vector<Scalar> query, key, value, cos, sin;
};

// The first column of a row that is new, and how many are.
template <class Scalar>
int64_t begin_of(const Inputs<Scalar>& in, size_t cache, int64_t row) {
  return std::max(in.first[row], in.caches[cache].held);
}
template <class Scalar>
int64_t count_of(const Inputs<Scalar>& in, size_t cache, int64_t row) {
  return std::max<int64_t>(0, in.caches[cache].held + in.caches[cache].num_new - begin_of(in, cache, row));
}

template <class Scalar>
Inputs<Scalar> inputs_of(const Shape& s) {
  std::mt19937 random(5);
  Inputs<Scalar> in;
  for (size_t c = 0; c < s.rows.size(); ++c) {
    const int64_t capacity = s.held[c] + s.new_tokens + static_cast<int64_t>(c);
    const int64_t own = s.rows[c] * s.key_heads * capacity * s.size, before = s.key_heads * s.prefix[c] * s.size;
    in.caches.push_back({random_values<Scalar>(own, 0.7f, random), random_values<Scalar>(own, 0.7f, random),
                         random_values<Scalar>(before, 0.7f, random), random_values<Scalar>(before, 0.7f, random),
                         s.rows[c], capacity, s.held[c], s.new_tokens, s.prefix[c], s.key_heads, s.size});
    // Some see all, some a part, one begins among the new tokens, or behind the only one.
    for (int64_t r = 0; r < s.rows[c]; ++r)
      in.first.push_back(r % 3 == 0 ? 0 : r % 3 == 1 ? s.held[c] / 2 : s.held[c] + 1);
  }
  in.token = {0};
  for (size_t c = 0; c < s.rows.size(); ++c)
    for (int64_t r = 0; r < s.rows[c]; ++r)
      in.token.push_back(in.token.back() + count_of(in, c, static_cast<int64_t>(in.token.size()) - 1));
  const int64_t tokens = in.token.back();
  in.query = random_values<Scalar>(tokens * s.heads * s.size, 0.7f, random);
  in.key = random_values<Scalar>(tokens * s.key_heads * s.size, 0.7f, random);
  in.value = random_values<Scalar>(tokens * s.key_heads * s.size, 0.7f, random);
  in.cos = random_values<Scalar>(tokens * s.rotary, 0.7f, random);
  in.sin = random_values<Scalar>(tokens * s.rotary, 0.7f, random);
  return in;
}

// Rows [row, row + the caches' rows) of the inputs, over the caches given, whose first new token is number `token`.
template <class Scalar>
std::vector<Scalar> attend(const Shape& s, Inputs<Scalar>& in, std::vector<luthier::CachedRows> caches, int64_t row,
                           int64_t token, luthier::Isa isa, int threads) {
  int64_t rows = 0, tokens = 0;
  for (const auto& cache : caches)
    for (int64_t r = 0; r < cache.num_rows; ++r, ++rows) {
      const int64_t end = cache.num_held + cache.num_new;
      tokens += std::max<int64_t>(0, end - std::max(in.first[row + rows], cache.num_held));
    }
  std::vector<Scalar> out(tokens * s.heads * s.size);
  const int64_t wide = s.heads * s.size, narrow_row = s.key_heads * s.size;
  const luthier::AttentionDecode problem{{in.query.data() + token * wide, wide, s.size},
                                         {in.key.data() + token * narrow_row, narrow_row, s.size},
                                         {in.value.data() + token * narrow_row, narrow_row, s.size},
                                         out.data(),
                                         s.rotary ? in.cos.data() + token * s.rotary : nullptr,
                                         s.rotary ? in.sin.data() + token * s.rotary : nullptr,
                                         caches.data(),
                                         in.first.data() + row,
                                         static_cast<int64_t>(caches.size()),
                                         rows,
                                         tokens,
                                         s.heads,
                                         s.key_heads,
                                         s.size,
                                         s.rotary,
                                         0.4f,
                                         s.softcap,
                                         dtype_of<Scalar>()};
  luthier::attention_decode(problem, isa, threads);
  return out;
}

// One head of one token turned, rounded as it is stored.
template <class Scalar>
std::vector<double> turned(const Shape& s, const Inputs<Scalar>& in, int64_t token, const Scalar* head) {
  std::vector<double> out;
  for (int64_t i = 0; i < s.size; ++i) {
    double value = widen(head[i]);
    if (i < s.rotary) {
      const int64_t half = s.rotary / 2, other = i < half ? i + half : i - half;
      value = value * widen(in.cos[token * s.rotary + i]) +
              (i < half ? -1 : 1) * widen(head[other]) * widen(in.sin[token * s.rotary + i]);
    }
    Scalar stored;
    narrow(static_cast<float>(value), &stored);
    out.push_back(widen(stored));
  }
  return out;
}

template <class Scalar>
void check_row(const Shape& s, Inputs<Scalar>& in, size_t c, int64_t r, int64_t row, const std::vector<Scalar>& out) {
  const Cache<Scalar>& cache = in.caches[c];
  for (int64_t i = 0; i < count_of(in, c, row); ++i)
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t g = h / (s.heads / s.key_heads), token = in.token[row] + i, last = begin_of(in, c, row) + i;
      const auto query = turned(s, in, token, in.query.data() + (token * s.heads + h) * s.size);
      std::vector<double> wanted(s.size);
      double total = 0;
      const auto see = [&](const Scalar* key, const Scalar* value) {
        double score = 0;
        for (int64_t d = 0; d < s.size; ++d) score += query[d] * widen(key[d]);
        score *= 0.4f;
        if (s.softcap > 0) score = s.softcap * std::tanh(score / s.softcap);
        const double weight = std::exp(score);
        total += weight;
        for (int64_t d = 0; d < s.size; ++d) wanted[d] += weight * widen(value[d]);
      };
      for (int64_t j = 0; j < cache.prefix; ++j) {
        const int64_t at = (g * cache.prefix + j) * s.size;
        see(cache.prefix_key.data() + at, cache.prefix_value.data() + at);
      }
      for (int64_t j = in.first[row]; j <= last; ++j) {
        const int64_t at = ((r * s.key_heads + g) * cache.capacity + j) * s.size;
        see(cache.key.data() + at, cache.value.data() + at);
      }
      for (int64_t d = 0; d < s.size; ++d)
        REQUIRE(close(widen(out[(token * s.heads + h) * s.size + d]), wanted[d] / total, tolerance<Scalar>()));
    }
}

// What was appended is the new keys, turned, and the new values.
template <class Scalar>
void check_appended(const Shape& s, const Inputs<Scalar>& in, size_t c, int64_t r, int64_t row) {
  const Cache<Scalar>& cache = in.caches[c];
  for (int64_t i = 0; i < count_of(in, c, row); ++i)
    for (int64_t g = 0; g < s.key_heads; ++g) {
      const int64_t token = in.token[row] + i;
      const int64_t at = ((r * s.key_heads + g) * cache.capacity + begin_of(in, c, row) + i) * s.size;
      const auto key = turned(s, in, token, in.key.data() + (token * s.key_heads + g) * s.size);
      for (int64_t d = 0; d < s.size; ++d) {
        REQUIRE(close(widen(cache.key[at + d]), key[d], tolerance<Scalar>()));
        REQUIRE(cache.value[at + d] == in.value[(token * s.key_heads + g) * s.size + d]);
      }
    }
}

// The same tokens column by column, and a few columns at a time.
template <class Scalar>
void check_pieces(const Shape& s, const std::vector<Scalar>& whole, int64_t columns, luthier::Isa isa, int threads) {
  Inputs<Scalar> in = inputs_of<Scalar>(s);
  const Inputs<Scalar> given = in;
  const int64_t wide = s.heads * s.size, narrow_row = s.key_heads * s.size;
  const auto take = [&](std::vector<Scalar>& into, const std::vector<Scalar>& from, int64_t token, int64_t size) {
    into.insert(into.end(), from.begin() + token * size, from.begin() + (token + 1) * size);
  };
  for (int64_t begin = 0; begin < s.new_tokens; begin += columns) {
    std::vector<int64_t> numbers;
    std::vector<luthier::CachedRows> caches;
    for (auto* one : {&in.query, &in.key, &in.value, &in.cos, &in.sin}) one->clear();
    int64_t row = 0;
    for (size_t c = 0; c < in.caches.size(); ++c) {
      caches.push_back(in.caches[c].problem());
      caches.back().num_held += begin;
      caches.back().num_new = std::min(columns, s.new_tokens - begin);
      for (int64_t r = 0; r < s.rows[c]; ++r, ++row)
        for (int64_t i = 0; i < count_of(given, c, row); ++i) {
          const int64_t column = begin_of(given, c, row) + i - caches.back().num_held;
          if (column >= 0 && column < caches.back().num_new) numbers.push_back(given.token[row] + i);
        }
    }
    for (int64_t token : numbers) {
      take(in.query, given.query, token, wide), take(in.key, given.key, token, narrow_row);
      take(in.value, given.value, token, narrow_row);
      take(in.cos, given.cos, token, s.rotary), take(in.sin, given.sin, token, s.rotary);
    }
    const auto out = attend(s, in, caches, 0, 0, isa, threads);
    REQUIRE(out.size() == numbers.size() * wide);
    for (size_t i = 0; i < numbers.size(); ++i)
      REQUIRE(!std::memcmp(out.data() + i * wide, whole.data() + numbers[i] * wide, wide * sizeof(Scalar)));
  }
}

template <class Scalar>
void check(const Shape& s, luthier::Isa isa, int threads) {
  Inputs<Scalar> in = inputs_of<Scalar>(s);
  std::vector<luthier::CachedRows> caches;
  for (auto& cache : in.caches) caches.push_back(cache.problem());
  const auto out = attend(s, in, caches, 0, 0, isa, threads);
  int64_t row = 0;
  for (size_t c = 0; c < in.caches.size(); ++c) {
    const auto alone = attend(s, in, {caches[c]}, row, in.token[row], isa, 1);
    const auto* at = out.data() + in.token[row] * s.heads * s.size;
    REQUIRE(!std::memcmp(alone.data(), at, alone.size() * sizeof(Scalar)));
    for (int64_t r = 0; r < s.rows[c]; ++r, ++row) {
      check_appended(s, in, c, r, row);
      check_row(s, in, c, r, row, out);
    }
  }
  if (s.new_tokens > 1)
    for (int64_t columns : {int64_t{1}, s.new_tokens / 2 + 1}) check_pieces(s, out, columns, isa, threads);
}

}  // namespace

int check_attention_decode(luthier::Isa isa, int threads) {
  const Shape shapes[] = {{{1}, {0}, {0}, 1, 1, 1, 1, 0, 0},
                          {{3, 1, 2}, {37, 4, 300}, {0, 11, 0}, 1, 6, 2, 17, 0, 0},
                          {{50, 1}, {5, 600}, {270, 1}, 1, 3, 1, 64, 64, 0},
                          {{3, 2}, {257, 2}, {3, 0}, 4, 4, 2, 80, 24, 2.0f},
                          {{3, 1}, {0, 200}, {0, 260}, 90, 2, 1, 33, 32, 0},
                          {{}, {}, {}, 1, 1, 1, 8, 0, 0}};
  for (const Shape& shape : shapes) {
    check<float>(shape, isa, threads);
    check<uint16_t>(shape, isa, threads);
  }
  return 12;
}
