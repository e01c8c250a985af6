//go:build tools

package tools

import _ "github.com/rqlite/rqlite/v8/cmd/rqlited"
