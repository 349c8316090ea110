# SPDX-License-Identifier: Apache-2.0
"""What we take from, and add to, the attention layers of a running model."""
