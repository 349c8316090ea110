# SPDX-License-Identifier: Apache-2.0
"""What a compressed request owns in SGLang's memory: its row, its slots, its positions."""
