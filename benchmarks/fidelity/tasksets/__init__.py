# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that `tasks` asks a server: samples, prompts and metrics, one suite a file."""
