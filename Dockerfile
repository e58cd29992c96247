# The demo in a container: docker build -t stepguard-demo . && docker run --rm stepguard-demo
FROM python:3.12-slim

WORKDIR /stepguard
COPY pyproject.toml README.md LICENSE ./
COPY src src
# An index that has PyTorch for the CPU alone makes the image a tenth as large: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir ".[torch,metrics]"
COPY examples examples

# A user without rights; what it trains lies in a volume.
RUN useradd --create-home train && mkdir -p /app/runs && chown -R train /app
USER train
WORKDIR /app
VOLUME /app/runs

# A list, not a line for a shell: SIGTERM comes to the program.
CMD ["python", "/stepguard/examples/demo.py", "--engine=torch"]
