# SPDX-License-Identifier: Apache-2.0
"""`lava-sglang demo`: real prompts to a real server, with and without compression."""
