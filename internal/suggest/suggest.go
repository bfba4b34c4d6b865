// Package suggest finds the known word that somebody who mistyped one meant.
package suggest

// Word returns the word of known that is nearest to typed, or "" if none is
// near enough to be worth a question.
func Word(typed string, known []string) string {
	best, at := "", 1+len(typed)/4
	for _, word := range known {
		if d := distance(typed, word); d <= at && (best == "" || d < at) {
			best, at = word, d
		}
	}
	return best
}

// DidYouMean is Word as the end of a message: ` (did you mean "x"?)`, or "".
func DidYouMean(typed string, known []string) string {
	if word := Word(typed, known); word != "" {
		return ` (did you mean "` + word + `"?)`
	}
	return ""
}

// distance counts the bytes to insert, delete, replace, or swap with their
// neighbour, that turn a into b.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range len(b) + 1 {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			replace := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				replace++
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, replace)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
