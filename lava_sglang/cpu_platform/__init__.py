# SPDX-License-Identifier: Apache-2.0
"""Lets stock SGLang serve on a machine without a GPU."""
