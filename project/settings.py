"""Django's settings, filled from `env.py`. One file for every way of running; nothing here is secret."""

from __future__ import annotations

import warnings
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static
from django.urls import reverse_lazy

from project import env as _env
from project.keyring import Keyring, secret_file

ENV = _env.read()
_env.own(ENV.data_dir)

BASE_DIR = _env.REPOSITORY
DEBUG = ENV.debug
DATA_DIR = ENV.data_dir
PUBLIC_URL = ENV.public_url
TRUSTED_PROXIES = ENV.trusted_proxies

if ENV.secret_key:
    SECRET_KEY = ENV.secret_key
elif ENV.one_process:
    SECRET_KEY = secret_file(DATA_DIR / "secret_key")
else:
    raise ImproperlyConfigured(
        "SECRET_KEY is not set. With Postgres or Redis several processes must share it: set SECRET_KEY or SECRET_KEY_FILE."
    )
KEYRING = Keyring(ENV.keyring, DATA_DIR / "keyring" if ENV.one_process else None, given=_env.keyring_file())

ALLOWED_HOSTS = ENV.allowed_hosts
CSRF_TRUSTED_ORIGINS = [ENV.public_url]

INSTALLED_APPS = [
    "project.apps.ProjectConfig",  # before staticfiles: it replaces runserver with Daphne's
    "unfold.apps.BasicAppConfig",  # only its templates and classes: the site is ours
    "project.apps.OperatorsAdmin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "allauth",
    "allauth.account",
    "ninja",
    "csp",
    "accounts",
    "providers",
    "proxy",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "project.content_policy.ContentPolicyMiddleware",
]

ROOT_URLCONF = "project.urls"
ASGI_APPLICATION = "project.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]

# Data

POSTGRES_CONNECTIONS = 8  # of one process
DATABASES = {"default": environ.Env.db_url_config(ENV.database_url)}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 5,
        # The ledger's thread alone checkpoints (proxy/ledger.py). mmap_size stays away: SQLite before 3.51.3 can
        # corrupt the log when it is reset, and mapped pages spread the damage.
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-16000; PRAGMA wal_autocheckpoint=0;",
    }
else:
    # Each connection is asked whether it lives before it is handed out, so that a restart of the database is felt by nobody who
    # comes after it. The pool gives an attempt up early: its pauses grow to half a minute, and it makes no other meanwhile.
    DATABASES["default"] |= {"CONN_HEALTH_CHECKS": True}
    DATABASES["default"]["OPTIONS"] = {
        "application_name": "sluice",
        "connect_timeout": 5,
        "keepalives_idle": 30,
        "tcp_user_timeout": 10_000,  # milliseconds: a machine that is gone says nothing
        **DATABASES["default"].get("OPTIONS", {}),
        "pool": {"min_size": 0, "max_size": POSTGRES_CONNECTIONS, "timeout": 3, "reconnect_timeout": 1, "max_lifetime": 30 * 60},
    }
# What one part of a process tells another. A socket stays in its group for as long as it lives, whatever its age.
CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer", "CONFIG": {"capacity": 20, "group_expiry": 10**9}}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# People

AUTH_USER_MODEL = "accounts.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.Argon2PasswordHasher", "django.contrib.auth.hashers.PBKDF2PasswordHasher"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = reverse_lazy("account_login")
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "/"
ACCOUNT_ADAPTER = "accounts.signin.AccountAdapter"
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*", "password2*"]
ACCOUNT_EMAIL_VERIFICATION = "none"
ACCOUNT_SESSION_REMEMBER = True
globals().update(environ.Env.email_url_config(ENV.email_url))
EMAIL_TIMEOUT = 10
DEFAULT_FROM_EMAIL = SERVER_EMAIL = ENV.mail_from or f"Sluice <sluice@{urlsplit(ENV.public_url).hostname}>"

SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = ENV.public_url.startswith("https:")
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if TRUSTED_PROXIES else None
# Else a cookie that was signed for one name and salt passes for another pair that reads the same when strung together.
SIGNED_COOKIE_LEGACY_SALT_FALLBACK = False
# Browsers keep to https for a year, with this name alone: those below it, and the list in the browsers, are not ours to promise.
SECURE_HSTS_SECONDS = 365 * 24 * 3600 if ENV.public_url.startswith("https:") else 0
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = 2_621_440

# Pages

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
# Times in the admin are UTC, and short enough for a column.
FORMAT_MODULE_PATH = ["project.formats"]
STATIC_URL = "/static/"
STATICFILES_DIRS = [BASE_DIR / "static"]
STATIC_ROOT = BASE_DIR / "staticfiles"
# Without a collected folder (make run, tests) files come straight from the apps.
WHITENOISE_USE_FINDERS = True
warnings.filterwarnings("ignore", message="No directory at", category=UserWarning)

CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "frame-ancestors": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
    },
}

UNFOLD = {
    "SITE_TITLE": "Sluice",
    "SITE_HEADER": "Sluice",
    "SITE_SUBHEADER": "for operators",
    "SITE_URL": "/",
    "SITE_ICON": lambda request: static("sluice/icon.svg"),
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("sluice/icon.svg")}],
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": False,
    "BORDER_RADIUS": "8px",
    "SIDEBAR": {"navigation": "project.operators.navigation"},
    # The accent of the pages, from pale to deep.
    "COLORS": {
        "primary": {
            "50": "oklch(97.5% 0.014 212)",
            "100": "oklch(94.5% 0.028 212)",
            "200": "oklch(89.5% 0.05 211)",
            "300": "oklch(82.5% 0.08 210)",
            "400": "oklch(73% 0.1 210)",
            "500": "oklch(60% 0.1 214)",
            "600": "oklch(49% 0.094 218)",
            "700": "oklch(43% 0.08 220)",
            "800": "oklch(37% 0.066 222)",
            "900": "oklch(32% 0.054 224)",
            "950": "oklch(24% 0.042 226)",
        }
    },
}

# Every handler formats through the redactor: a secret that reaches a message, its arguments or a traceback stays out.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"redacted": {"()": "project.logs.RedactingFormatter", "style_name": ENV.log_format}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "redacted"}},
    "root": {"handlers": ["stderr"], "level": ENV.log_level},
    "loggers": {
        "django": {"handlers": [], "level": "INFO", "propagate": True},
        "django.server": {"handlers": [], "level": "INFO", "propagate": True},
        "uvicorn": {"handlers": [], "level": "INFO", "propagate": True},
        "uvicorn.websocket": {"handlers": [], "level": "WARNING", "propagate": True},
        "uvicorn.access": {"handlers": [], "level": "WARNING", "propagate": True},
        "httpx": {"handlers": [], "level": "WARNING", "propagate": True},
        "httpcore": {"handlers": [], "level": "WARNING", "propagate": True},
        "daphne": {"handlers": [], "level": "INFO", "propagate": True},
    },
}

# What this process serves: "gateway" (/v1), "web" (the rest) or both. `serve --only` says so.
SERVE_ONLY = ""

SILENCED_SYSTEM_CHECKS = [
    "security.W005",  # HSTS for names below ours, and
    "security.W021",  # for the browsers' list: whoever owns the whole domain decides that, at the proxy in front
    "security.W008",  # the proxy in front sends http to https: it alone is reached by both
    "security.W009",  # sluice.W010 asks the same of SECRET_KEY, and says how to make one
]
