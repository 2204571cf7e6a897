# An image of carserver and its locked requirements, without what built them.
#
#   docker build -t carserver .
#   docker run --read-only --cap-drop ALL -v carserver:/state -p 127.0.0.1:9100:9100 carserver
#
# BASE is any image of Debian's kind that has Python 3.11 or newer with its venv module (Debian: python3, python3-venv).
# Both stages take the same one, so the virtual environment finds the Python that it was made with.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/carserver
COPY requirements/run.lock ./
# As scripts/_venv does it: nothing is installed that has no hash, and nothing is compiled.
RUN tools/bin/pip --python /opt/carserver/bin/python install --no-cache-dir --no-compile --no-deps \
        --require-hashes --only-binary=:all: -r run.lock
COPY pyproject.toml ./
COPY carserver carserver
# flit_core, which the lock has too, builds carserver and goes again. Bytecode that is never compared with its source
# needs no clock that agrees and no folder that can be written.
RUN tools/bin/pip --python /opt/carserver/bin/python install --no-cache-dir --no-compile --no-deps \
        --no-build-isolation . \
    && tools/bin/pip --python /opt/carserver/bin/python uninstall --yes flit_core \
    && /opt/carserver/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/carserver/lib

FROM ${BASE}
# The user by its number: a folder of the host is made its own by `chown 10001`, and an engine sees that it is not root.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /state --shell /usr/sbin/nologin carserver \
    && install --directory --mode 0700 --owner carserver --group carserver /state
COPY --from=build /opt/carserver /opt/carserver
# All of the container's addresses: what is reachable of them is what is published. Names other than the loopback ones
# by which peers come (http://carserver:9100 of a neighbour) go into CARSERVER_ALLOW_HOST.
ENV PATH=/opt/carserver/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    CARSERVER_HOST=0.0.0.0 \
    CARSERVER_STATE_DIR=/state
USER 10001:10001
VOLUME /state
EXPOSE 9100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s --retries=3 CMD ["carserver", "health", "--timeout", "4"]
ENTRYPOINT ["carserver"]
CMD ["serve"]
