# SPDX-License-Identifier: Apache-2.0
"""The parts of bench_serving.py: load, servers, measurement, report."""
