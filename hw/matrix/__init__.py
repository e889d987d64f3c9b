"""Matrix unit: dot units, accumulators, epilogue."""
