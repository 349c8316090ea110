# SPDX-License-Identifier: Apache-2.0
"""The life of a compressed request inside SGLang's scheduler."""
