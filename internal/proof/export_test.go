package proof

import "time"

// InTurn is inTurn of a large index.
func InTurn(db, schema, name string, day time.Time) bool {
	return inTurn(relation{Schema: schema, Name: name, Pages: smallIndex + 1}, db, day)
}
