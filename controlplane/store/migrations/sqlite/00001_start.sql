-- Instants are nanoseconds since 1970 in UTC, NULL for none. Durations are
-- nanoseconds. Lists are JSON. An id that may be absent is NULL, never ''.
--
-- A partial index serves a query only if the query repeats the index's
-- condition word for word: see the constants in the Go files beside it.

-- +goose Up
CREATE TABLE server (
    one                INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    id                 TEXT    NOT NULL,
    epoch              INTEGER NOT NULL,
    agents_certificate BLOB,
    agents_sealed_key  BLOB,
    tls_certificate    BLOB,
    tls_sealed_key     BLOB,
    join_key           BLOB,
    created            INTEGER
) STRICT;

-- The next number of each kind of thing that is numbered.
CREATE TABLE numbers (
    name  TEXT    NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO numbers (name, value) VALUES ('lease', 0);

CREATE TABLE organizations (
    id      TEXT NOT NULL PRIMARY KEY,
    name    TEXT NOT NULL UNIQUE,
    created INTEGER
) STRICT;

CREATE TABLE projects (
    id                     TEXT    NOT NULL PRIMARY KEY,
    org                    TEXT    NOT NULL REFERENCES organizations (id),
    name                   TEXT    NOT NULL,
    size                   TEXT    NOT NULL,
    idle_timeout           INTEGER NOT NULL,
    max_builds_per_machine INTEGER NOT NULL,
    max_machines           INTEGER NOT NULL,
    cache_keep             INTEGER NOT NULL,
    cache_bytes            INTEGER NOT NULL,
    entitlements           TEXT    NOT NULL,
    certificate            BLOB,
    sealed_key             BLOB,
    request                TEXT,
    created                INTEGER,
    UNIQUE (org, name)
) STRICT;

CREATE TABLE tokens (
    id       TEXT NOT NULL PRIMARY KEY,
    kind     TEXT NOT NULL,
    name     TEXT NOT NULL,
    org      TEXT,
    project  TEXT REFERENCES projects (id) ON DELETE CASCADE,
    role     TEXT NOT NULL,
    hash     BLOB,
    created  INTEGER,
    expires  INTEGER,
    used     INTEGER,
    used_key BLOB
) STRICT;
CREATE INDEX tokens_project ON tokens (project, created, id) WHERE project IS NOT NULL;

CREATE TABLE leases (
    id                TEXT    NOT NULL PRIMARY KEY,
    project           TEXT    NOT NULL,
    arch              TEXT    NOT NULL,
    isolated          INTEGER NOT NULL,
    principal         TEXT    NOT NULL,
    principal_name    TEXT    NOT NULL,
    key               BLOB,
    seq               INTEGER NOT NULL UNIQUE,
    state             TEXT    NOT NULL,
    machine           TEXT,
    queued            INTEGER NOT NULL,
    reason            TEXT    NOT NULL,
    end_cause         TEXT    NOT NULL,
    connections       INTEGER NOT NULL,
    connected         INTEGER NOT NULL,
    created           INTEGER,
    polled            INTEGER,
    ready             INTEGER,
    renewed           INTEGER,
    quiet             INTEGER,
    ended             INTEGER,
    cancel_refs       TEXT    NOT NULL,
    certificate_until INTEGER
) STRICT;
CREATE INDEX leases_scope     ON leases (project, arch, seq)  WHERE state <> 'ended';
CREATE INDEX leases_machine   ON leases (machine, seq)        WHERE state <> 'ended';
CREATE INDEX leases_principal ON leases (principal, seq)      WHERE state <> 'ended';
CREATE INDEX leases_queue     ON leases (arch, project, seq)  WHERE state = 'waiting' AND queued;
CREATE INDEX leases_certified ON leases (machine, certificate_until) WHERE state = 'ended';
CREATE INDEX leases_ended     ON leases (ended)               WHERE state = 'ended';

CREATE TABLE machines (
    id                 TEXT    NOT NULL PRIMARY KEY,
    project            TEXT    NOT NULL,
    arch               TEXT    NOT NULL,
    emulated           INTEGER NOT NULL,
    isolated           INTEGER NOT NULL,
    agent              TEXT    NOT NULL,
    pool               TEXT    NOT NULL,
    volume             TEXT,
    writer_epoch       INTEGER NOT NULL,
    generation         TEXT,
    cpus               INTEGER NOT NULL,
    memory_bytes       INTEGER NOT NULL,
    state              TEXT    NOT NULL,
    reason             TEXT    NOT NULL,
    now                INTEGER NOT NULL,
    key                BLOB,
    address            TEXT    NOT NULL,
    created            INTEGER,
    ordered            INTEGER,
    launched           INTEGER,
    ready              INTEGER,
    idle               INTEGER,
    draining           INTEGER,
    ended              INTEGER,
    gone               INTEGER,
    seen               INTEGER,
    usage_at           INTEGER,
    disk_used_bytes    INTEGER NOT NULL,
    disk_free_bytes    INTEGER NOT NULL,
    cpu_time           INTEGER NOT NULL,
    memory_used_bytes  INTEGER NOT NULL,
    memory_limit_bytes INTEGER NOT NULL,
    buildkit           TEXT    NOT NULL,
    warnings           TEXT    NOT NULL,
    clean              INTEGER NOT NULL
) STRICT;
-- one-writer: no program error can give a volume to a second machine.
CREATE UNIQUE INDEX machines_writer ON machines (volume) WHERE gone IS NULL;
CREATE INDEX machines_scope   ON machines (project, arch, id) WHERE gone IS NULL OR state NOT IN ('stopped', 'failed');
CREATE INDEX machines_agent   ON machines (agent, id)         WHERE gone IS NULL OR state NOT IN ('stopped', 'failed');
CREATE INDEX machines_pool    ON machines (agent, pool, project, arch) WHERE gone IS NULL;
CREATE INDEX machines_project ON machines (project, id);
CREATE INDEX machines_ended   ON machines (ended)             WHERE gone IS NOT NULL;

CREATE TABLE volumes (
    id       TEXT    NOT NULL PRIMARY KEY,
    project  TEXT    NOT NULL,
    arch     TEXT    NOT NULL,
    agent    TEXT    NOT NULL,
    pool     TEXT    NOT NULL,
    isolated INTEGER NOT NULL,
    writers  INTEGER NOT NULL,
    state    TEXT    NOT NULL,
    created  INTEGER
) STRICT;
CREATE INDEX volumes_project ON volumes (project, id) WHERE state <> 'tombstone';
CREATE INDEX volumes_agent   ON volumes (agent, id);

CREATE TABLE generations (
    id      TEXT NOT NULL PRIMARY KEY,
    volume  TEXT NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
    machine TEXT NOT NULL,
    state   TEXT NOT NULL,
    created INTEGER,
    closed  INTEGER
) STRICT;
CREATE INDEX generations_volume ON generations (volume, created, id);

CREATE TABLE agents (
    id        TEXT    NOT NULL PRIMARY KEY,
    name      TEXT    NOT NULL,
    token     TEXT,
    key       BLOB,
    session   TEXT    NOT NULL,
    connected INTEGER NOT NULL,
    seen      INTEGER,
    version   TEXT    NOT NULL,
    orphans   TEXT    NOT NULL,
    created   INTEGER
) STRICT;

CREATE TABLE pools (
    agent        TEXT    NOT NULL REFERENCES agents (id) ON DELETE CASCADE,
    name         TEXT    NOT NULL,
    provider     TEXT    NOT NULL,
    arch         TEXT    NOT NULL,
    emulated     INTEGER NOT NULL,
    max_machines INTEGER NOT NULL,
    isolated     INTEGER NOT NULL,
    cpus         INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    warnings     TEXT    NOT NULL,
    closed       TEXT    NOT NULL,
    PRIMARY KEY (agent, name)
) STRICT;
CREATE INDEX pools_arch ON pools (arch, agent, name);
