# SPDX-License-Identifier: Apache-2.0
"""KV-cache compression for SGLang: LAVa and its baselines as a plugin."""

__version__ = "0.1.0"
