# SPDX-License-Identifier: Apache-2.0
"""Throughput, latency and concurrency of servers: load, servers, measurement, report."""
