# SPDX-License-Identifier: Apache-2.0
"""Times of the operations: decode on a CPU and on a GPU, compression."""
