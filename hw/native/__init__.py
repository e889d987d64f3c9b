"""A ring of kernels as one native program: Verilator's model, and C++ models of memories, links and host."""
