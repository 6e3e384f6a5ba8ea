"""How bytes travel: the link to an aggregator, the service it runs, and the directory in which both find each other."""

import os

# gRPC's C core prints its own diagnostics to stderr. Their reasons reach people through LinkError instead, so they are
# switched off unless somebody who debugs the transport has asked for them. This must happen before grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
