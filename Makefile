# make setup   .venv with torch, this package and, where there is a compiler, its kernels
# make demo    the same, then train and evaluate the miniature: minutes
# make miniature   the whole ablation on drawn images, three seeds, and small DiTs on its latents: hours; it
#                  goes on where it was interrupted
# make test    the same with the test oracles, then the tests; PYTEST="-m slow" or PYTEST=tests/test_sae.py
#              choose others
# PYTHON=python3.12 chooses the interpreter of a new .venv. Stamps in .venv let a second run start at once.

PYTHON ?= python3
PYTEST ?=
PIP := .venv/bin/python -m pip --disable-pip-version-check install
SOURCES := setup.py $(wildcard csrc/*)

.PHONY: setup demo miniature test
.NOTPARALLEL:

setup: .venv/setup.stamp

demo: .venv/setup.stamp
	.venv/bin/python tests/miniature.py

miniature: .venv/setup.stamp
	.venv/bin/python tests/miniature.py --rows all --seeds 0 1 2 --waves 4 12 --steps 300 2200 --out .miniature
	.venv/bin/python tests/generation.py --runs .miniature

test: .venv/test.stamp
	.venv/bin/python -m pytest $(PYTEST)

# torch comes first and the package is built against it: an isolated build would fetch a second torch of
# another version. Older versions of pip isolate an editable build even when told not to.
.venv/torch.stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	    "$(PYTHON) is Python %d.%d; S-AE needs 3.10 or newer: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(PIP) 'pip>=25.3' 'setuptools>=77' ninja 'torch>=2.11'
	@touch $@

.venv/setup.stamp: .venv/torch.stamp $(SOURCES)
	$(PIP) --no-build-isolation -e .
	@touch $@

.venv/test.stamp: .venv/torch.stamp $(SOURCES)
	$(PIP) --no-build-isolation -e '.[test]'
	@touch .venv/setup.stamp $@
