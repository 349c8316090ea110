# SPDX-License-Identifier: Apache-2.0
"""Commands that measure: `python -m benchmarks.serving`, `python -m benchmarks.fidelity.needle`."""
