"""Products with a frozen weight in 8-bit integers: products, rounding of rows, weights from their codes, sums."""
