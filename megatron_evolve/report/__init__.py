"""The report: a campaign told as one self-contained HTML file, made from what its folder holds."""

from megatron_evolve.report.page import write_report

__all__ = ["write_report"]
