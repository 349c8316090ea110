# SPDX-License-Identifier: Apache-2.0
"""Where we enter SGLang: arguments, hooks, the list of places we touch, refusals."""
