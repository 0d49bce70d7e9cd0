# The platform as an image: `mist`, the extras, and nothing of the tools of development. Small, not root, nothing writable
# but what is mounted. Works with the classic builder and with BuildKit.
#
#   docker build -t mist-stack:local .

ARG PYTHON_IMAGE=python:3.13.9-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
LABEL mist.stage=build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /opt/mist
# Every distribution of the lock is fetched and compared with its hashes; the installation below takes only from these.
# (One pure-Python sdist, nkeys, is built on the way; its build needs setuptools, which the lock does not name.)
COPY requirements.lock ./
RUN python -m pip download --quiet --require-hashes --dest /wheels --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY brokers brokers
COPY mist mist
RUN python -m pip --python /opt/mist/bin/python install --quiet --no-index --find-links /wheels '.[all]' \
 && /opt/mist/bin/mist version

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="mist" \
      org.opencontainers.image.description="Event streaming for LLM tool stacks" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /opt/mist /opt/mist
# A volume mounted here for the first time belongs to the user below.
RUN mkdir /data && chown 10001:10001 /data
ENV PATH=/opt/mist/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data XDG_STATE_HOME=/data/state XDG_CONFIG_HOME=/data/config MIST_URL=log:/data/log
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
ENTRYPOINT ["mist"]
CMD ["up", "--listen", "0.0.0.0:8080"]
