# SPDX-License-Identifier: Apache-2.0
"""The parts of simulate.py: traces, costs of a step, slots, the scheduler's loop, calibration."""
