# SPDX-License-Identifier: Apache-2.0
"""Looks at what a method keeps, on a transformers model, without a server."""
