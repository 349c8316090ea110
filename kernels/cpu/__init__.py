# SPDX-License-Identifier: Apache-2.0
"""Ops for serving on a CPU: decode over the tape, and extend that leaves the prefix alone."""
