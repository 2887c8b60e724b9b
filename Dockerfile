# chatd in a virtual environment; docker-compose.yml runs it beside PostgreSQL and Redis.

FROM python:3.12-slim-bookworm AS build
WORKDIR /src
# Nothing but this directory goes from here into the image.
RUN python -m venv /opt/chatd
COPY pyproject.toml README.md LICENSE ./
COPY chatd ./chatd
COPY clients ./clients
# Compiled here, for the container, whose file system is read-only, could not keep its bytecode.
RUN /opt/chatd/bin/pip install --disable-pip-version-check --no-cache-dir --compile .

FROM python:3.12-slim-bookworm
RUN groupadd --gid 10001 chatd \
    && useradd --uid 10001 --gid chatd --home-dir /var/lib/chatd --no-create-home --shell /usr/sbin/nologin chatd \
    && install --directory --owner chatd --group chatd --mode 0700 /var/lib/chatd
COPY --from=build /opt/chatd /opt/chatd
ENV PATH=/opt/chatd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1
USER 10001:10001
# The default database, sqlite:///chatd.db, is relative to this: mount a volume here, or set CHATD_DATABASE__URL.
WORKDIR /var/lib/chatd
EXPOSE 6001 8080
# Well while messages can be stored, Redis or not. It asks where CHATD_API__BIND says.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["chatd", "healthcheck", "--ready"]
ENTRYPOINT ["chatd"]
CMD ["serve"]
