// Tiles in plain loops, for tests on processors without AMX: what the instructions do, with their roundings.
//
// A product adds the 16 even and the 16 odd terms of a dot product apart, then both together to C (Intel's manual,
// TDPBF16PS); denormals count as zero.

struct EmulatedTiles {
  uint32_t row[8][16][16];
};
inline thread_local EmulatedTiles emulated_tiles;

inline void begin_tiles() { emulated_tiles = {}; }
inline void end_tiles() {}

inline void emulated_load(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(emulated_tiles.row[tile][r], static_cast<const char*>(from) + r * stride, 64);
}
inline void emulated_store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, emulated_tiles.row[tile][r], 64);
}
inline float emulated_half(uint32_t pair, int half) {
  const uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
  return (bits & 0x7f800000u) ? std::bit_cast<float>(bits) : 0.0f;
}
inline void emulated_multiply(int c, int a, int b) {
  auto& tiles = emulated_tiles.row;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum[2] = {0.0f, 0.0f};
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          sum[half] += emulated_half(tiles[a][m][k], half) * emulated_half(tiles[b][k][n], half);
      tiles[c][m][n] = std::bit_cast<uint32_t>(std::bit_cast<float>(tiles[c][m][n]) + (sum[0] + sum[1]));
    }
}

#define FLASH_ATTN_TILE_ZERO(tile) std::memset(emulated_tiles.row[tile], 0, 1024)
#define FLASH_ATTN_TILE_LOAD(tile, from, stride) emulated_load(tile, from, stride)
#define FLASH_ATTN_TILE_STORE(tile, to, stride) emulated_store(tile, to, stride)
#define FLASH_ATTN_TILE_MULTIPLY(c, a, b) emulated_multiply(c, a, b)
