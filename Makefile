PYTHON = python3
TASK = xor
ARGS =

run: .venv/ready
	@.venv/bin/python random_search.py --task $(TASK) $(ARGS)

test: .venv/ready
	@.venv/bin/python -m pytest -q test_random_search.py

.venv/ready: requirements.txt
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch .venv/ready

clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__

.PHONY: run test clean
