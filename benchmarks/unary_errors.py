"""Print the largest error of every unary function: `python benchmarks/unary_errors.py`."""

from typebar.isa.numerics.unary_errors import format_report, unary_error_report

if __name__ == "__main__":
    print(format_report(unary_error_report()))
