# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show. `make gpu` runs these; a plain pytest run collects nothing here."""

from tests.kernels.device import ON_GPU

collect_ignore_glob = [] if ON_GPU else ["test_*.py"]
