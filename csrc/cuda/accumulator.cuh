// What warpgroups do with the sums of a product, which lie in their registers as hopper_layout.h says.
// The includer provides the functions of hopper.cuh: that header, or the emulator of the tests.
#pragma once

#include <cstdint>

namespace vitup::hopper {

// scale x Phi(x), Phi by the hardware's tanh: 8 instructions, as exact as bfloat16 can show.
VITUP_DEVICE float gelu(float x, float scale = 1.0f) {
  const float square = fminf(x * x, 36.0f);
  const float logit = x * fmaf(square, fmaf(square, -3.516701170e-04f, 3.700658995e-02f), 7.975068470e-01f);
  const float half = 0.5f * scale * x;
  return fmaf(half, tanh_approx(logit), half);
}

// Sum over the four threads that share a row.
VITUP_DEVICE float row_sum(float part) {
  part += shuffle_xor(part, 1);
  return part + shuffle_xor(part, 2);
}

// Exchange values between the four threads of a row until thread i's value j is what was thread j's value i. Pairs of
// columns 8 j + 2 i and 8 j + 2 i + 1 become 8 columns side by side, 16 bytes, and those pairs again.
VITUP_DEVICE void transpose_row(std::uint32_t (&pairs)[4], std::uint32_t thread) {
  const bool odd = thread % 2, high = thread % 4 / 2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const std::uint32_t received = shuffle_xor(high ? pairs[j] : pairs[j + 2], 2);
    (high ? pairs[j] : pairs[j + 2]) = received;
  }
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const std::uint32_t received = shuffle_xor(odd ? pairs[j] : pairs[j + 1], 1);
    (odd ? pairs[j] : pairs[j + 1]) = received;
  }
}

}  // namespace vitup::hopper
