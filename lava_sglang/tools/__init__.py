# SPDX-License-Identifier: Apache-2.0
"""All that is not serving: command line, doctor, demo, inspection."""
