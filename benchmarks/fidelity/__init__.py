# SPDX-License-Identifier: Apache-2.0
"""What compression loses: divergence, needles, later turns."""
