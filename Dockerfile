# syntax=docker/dockerfile:1
# Two stages: what is needed to build stays behind. The result runs as nobody in particular and writes to /data and /tmp alone.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/venv
COPY requirements/prod.txt /tmp/prod.txt
RUN /opt/venv/bin/pip install --no-cache-dir --require-hashes -r /tmp/prod.txt
COPY manage.py /app/
COPY accounts /app/accounts
COPY providers /app/providers
COPY proxy /app/proxy
COPY project /app/project
COPY templates /app/templates
COPY static /app/static
COPY deploy /app/deploy
WORKDIR /app
# The settings want a folder of their own, and make secrets there: both stay in this stage.
RUN DATA_DIR=/tmp/build /opt/venv/bin/python manage.py collectstatic --no-input && /opt/venv/bin/python -m compileall -q /app /opt/venv

FROM python:3.13-slim
LABEL org.opencontainers.image.title="Sluice" org.opencontainers.image.licenses="MIT"
RUN groupadd --gid 10001 sluice && useradd --uid 10001 --gid sluice --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sluice \
    && install -d -o sluice -g sluice -m 0700 /data /secrets
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DATA_DIR=/data LOG_FORMAT=json
WORKDIR /app
USER sluice
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "deploy/healthy.py", "http://127.0.0.1:8000/readyz"]
CMD ["sh", "deploy/single.sh"]
