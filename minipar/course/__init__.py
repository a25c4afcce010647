"""The course beside the package: notebooks from their sources, and exercises graded from the command line."""

import sys

# jsonschema parses a grammar of web addresses when it is imported: 1.4 s, for a format that no notebook has.
# It does without where the module cannot be imported.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
