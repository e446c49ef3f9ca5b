// The definition's constant axes.
#pragma once

#include <cstdint>

constexpr int64_t N = 128;
constexpr int64_t K = 256;
