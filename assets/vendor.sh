#!/bin/sh
# Copies what the pages use of other projects into static/, each with its licence. Run by `npm run vendor`.
set -eu
cd "$(dirname "$0")/.."
mkdir -p static/vendor
grep -v '^//# sourceMappingURL=' node_modules/chart.js/dist/chart.umd.min.js > static/vendor/chart.js
cp node_modules/chart.js/LICENSE.md static/vendor/chart.LICENSE.md
for part in latin latin-ext; do
  cp "node_modules/@fontsource-variable/inter/files/inter-$part-wght-normal.woff2" "static/vendor/inter-$part.woff2"
done
cp node_modules/@fontsource-variable/inter/LICENSE static/vendor/inter.LICENSE.txt
